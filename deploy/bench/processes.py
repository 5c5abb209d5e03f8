"""Processes that a benchmark starts: a launched service and a bare engine. Each ends with its `with` block."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollout_service.config import ServiceConfig
from rollout_service.engine.hardware import engine_environment, machine_cores, resolve_device

BIN = Path(sys.executable).parent
STOP_WITHIN = 30


@contextmanager
def launched(*arguments: str) -> Iterator[str]:
    """Runs `rollout-service launch` and yields its URL once it serves."""
    process = subprocess.Popen(
        [str(BIN / "rollout-service"), "launch", "--port", "0", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found.group()
                return
        raise RuntimeError("the service did not start:\n" + "".join(said))
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()


def flags(config: ServiceConfig) -> list[str]:
    """The command-line flags that give a service this configuration."""
    found = ["--model", config.model, "--drafter.kind", config.drafter.kind]
    for name in ("dtype", "max_model_len", "max_num_seqs", "kv_cache_gib", "cores"):
        found += [f"--engine.{name}", str(getattr(config.engine, name))]
    if config.drafter.kind != "none":
        assert isinstance(config.drafter.schedule, str)
        found += ["--drafter.draft_tokens", str(config.drafter.draft_tokens)]
        found += ["--drafter.schedule", config.drafter.schedule]
        found += ["--drafter.draft_sampling", config.drafter.draft_sampling]
        found += ["--drafter.model", config.drafter.model] if config.drafter.model else []
    return found


class BareEngine:
    """vLLM's LLM in its own process (bare_engine.py), with environment and arguments of the service's engine."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def bare_engine(config: ServiceConfig) -> Iterator[BareEngine]:
    device = resolve_device(config.engine.device)
    environment = os.environ | engine_environment(device, config.engine.cores or machine_cores())
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("bare_engine.py")), config.model_dump_json()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        engine = BareEngine(process)
        engine.ask(ready=True)
        yield engine
    finally:
        process.terminate()
        process.wait(STOP_WITHIN)
