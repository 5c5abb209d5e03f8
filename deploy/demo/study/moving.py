"""Part 3: reinforcement learning that moves the policy far, with a drafter that is frozen, trained online, or adaptive.

Each arm runs `rl-loop train` against the endpoint of a launched service. All arms have the same start and the same
seeds.
"""

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

from config import StudyConfig

from drafters.files.text_lines import json_lines

BIN = Path(sys.executable).parent


def moving(config: StudyConfig) -> list[dict[str, Any]]:
    """One row for each arm: acceptance and reward by step, pushes, and rollout time. An interrupted arm is resumed."""
    left = [name for name in config.moving.arms if not (_output(config, name) / "summary.json").is_file()]
    if left:
        # All arms share one service. Each arm first pushes the policy and the drafter that it starts with.
        with service(config) as endpoint:
            for name in left:
                file = config.work / f"moving-{name}.json"
                settings = _train_config(config, name, endpoint, _output(config, name))
                file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
                _train(file, _output(config, name))
    return [_arm(config, name) for name in config.moving.arms]


def _output(config: StudyConfig, name: str) -> Path:
    return config.work / f"moving-{name}"


def _arm(config: StudyConfig, name: str) -> dict[str, Any]:
    output = _output(config, name)
    steps = _lines(output / "metrics.jsonl")
    drafter = _lines(output / "drafter.jsonl")
    return {
        "arm": name,
        "acceptance_length": [line["acceptance_length"] for line in drafter],
        "reward": [line["reward"] for line in steps],
        "drafter_version": [line["drafter_version"] for line in drafter],
        "drafter_age": [line["drafter_age"] for line in drafter],
        "policy_kl": [line["policy_kl"] for line in steps],
        "trained_steps": sum(line["updates"] > 0 for line in drafter),
        "tokens": sum(line["tokens"] for line in steps),
        "rollout_seconds": sum(line["stages"]["generation"] for line in steps),
        "drafter_training_seconds": sum(line["seconds"] for line in drafter),
        "verifications_per_token": sum(line["draft_steps"] for line in drafter) / sum(line["tokens"] for line in steps),
        "z": steps[-1]["z_running"],
    }


def _train_config(config: StudyConfig, name: str, endpoint: str, output: Path) -> dict[str, Any]:
    model = next(drafter.model for drafter in config.drafters if drafter.kind == config.moving.kind)
    drafter = {"kind": config.moving.kind, "model": model, "training": config.moving.arms[name]}
    return config.moving.train | {
        "model": config.model,
        "endpoint": endpoint,
        "output": str(output),
        "resume": True,
        "online_drafter": {key: value for key, value in drafter.items() if value is not None},
    }


def _train(file: Path, output: Path) -> None:
    """Runs the training of `rl-loop train` in its own process, with the configuration as a file."""
    code = (
        "import json, sys; from rl_loop.config import TrainConfig; from rl_loop.training import run_training; "
        "from rl_loop.loops.interruption import Interruption\n"
        "with Interruption() as i: run_training(TrainConfig.model_validate(json.load(open(sys.argv[1]))), i)"
    )
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=os.environ | {"PYTHONPATH": path})
    assert (output / "summary.json").is_file()


@contextmanager
def service(config: StudyConfig) -> Iterator[str]:
    """Runs `rollout-service launch` with the study's drafter, and yields its URL."""
    drafter = next(drafter for drafter in config.drafters if drafter.kind == config.moving.kind)
    flags = {"model": config.model, "port": "0", "drafter.kind": drafter.kind}
    # Fixed, because acceptance lengths can be compared at one draft length only.
    flags |= {"drafter.draft_tokens": str(drafter.draft_tokens), "drafter.schedule": "fixed"}
    flags |= {"drafter.model": drafter.model} if drafter.model else {}
    engine = config.engine.model_dump(exclude_none=True, exclude_defaults=True, exclude={"vllm"})
    flags |= {f"engine.{key}": str(value) for key, value in engine.items()}
    command = [str(BIN / "rollout-service"), "launch", *(part for k, v in flags.items() for part in (f"--{k}", v))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found.group()
                break
        else:
            raise RuntimeError("the service did not start:\n" + "".join(said))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _lines(file: Path) -> list[dict[str, Any]]:
    return list(json_lines(file))
