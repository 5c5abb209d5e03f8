"""The two processes that faults hit: a service with a state folder, and an asynchronous trainer with checkpoints."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from engines import CORES, ROOT, START_WITHIN

from drafters.files.text_lines import byte_lines

RAY_AGENTS = ("dashboard", "Dashboard", "runtime_env", "RuntimeEnvAgent")
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Process:
    """A command that is started, killed, and started again. All its output goes to one file."""

    def __init__(self, log: Path):
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, *command: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "OMP_NUM_THREADS")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], stdout=log, stderr=log, cwd=ROOT, env=environment
            )

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True) if self.is_alive and self.process else []

    def kill(self) -> None:
        """Kill -9. Returns when its children have ended. Ray's agents would take too long, so they are killed."""
        assert self.process is not None
        names = {child: " ".join(command_line(child))[:200] for child in self.children()}
        self.process.kill()
        self.process.wait()
        agents = [child for child, name in names.items() if any(agent in name for agent in RAY_AGENTS)]
        _, left = psutil.wait_procs([child for child in names if child not in agents], timeout=60)
        for agent in agents:
            with contextlib.suppress(psutil.NoSuchProcess):
                agent.kill()
        assert not left, f"left behind by a killed {self.log.stem}: {[names[child] for child in left]}"

    def stop(self, signum: int, within: float) -> int:
        """Stop it by a signal, and return its exit code. No child process may be left."""
        assert self.process is not None
        children = self.children()
        self.process.send_signal(signum)
        code = self.process.wait(within)
        _, left = psutil.wait_procs(children, timeout=15)
        assert not left, f"left behind by {self.log.stem}: {left}"
        return code


class Service(Process):
    def __init__(self, folder: Path, *flags: str):
        super().__init__(folder / "service.log")
        self.state, self.flags, self.port = folder / "state", flags, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        began = self.log.read_text().count("Serving") if self.log.exists() else 0
        self.spawn(
            "rollout-service", "launch", "--config", "deploy/demo/service.toml", "--port", str(self.port),
            "--state", str(self.state), "--engine.cores", str(CORES), *self.flags,
        )  # fmt: skip
        deadline = time.monotonic() + START_WITHIN
        while self.log.read_text().count("Serving") == began:
            assert self.is_alive, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the service did not start in time"
            time.sleep(0.2)

    def engine(self) -> psutil.Process | None:
        """The process in which vLLM generates, or None while it is starting."""
        found = [p for p in self.children() if re.search("EngineCore", " ".join(command_line(p)))]
        return found[0] if found else None


class Trainer(Process):
    def __init__(self, folder: Path, url: str, *flags: str):
        super().__init__(folder / "trainer.log")
        self.output, self.url, self.flags = folder / "run", url, flags

    def start(self) -> None:
        self.spawn(
            "rl-loop", "train", "--config", "deploy/demo/train.toml", "--mode", "async", "--endpoint", self.url,
            "--output", str(self.output), *self.flags, "--resume",
        )  # fmt: skip

    def steps(self) -> int:
        file = self.output / "metrics.jsonl"
        return len(byte_lines(file)) if file.is_file() else 0

    def interrupt(self) -> int:
        return self.stop(signal.SIGTERM, within=60)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
