"""deploy/cluster/slurm.sh with a stand-in for srun: two Ray nodes on this machine, the service, and a learner."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engines import ROOT, free_port, wait_until

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
CORES = len(os.sched_getaffinity(0))
WITHIN = 240.0


@pytest.fixture
def job() -> Iterator[Path]:
    """A folder with a short name, because Ray makes sockets in it. Nothing of the job may be left."""
    folder = Path(tempfile.mkdtemp(prefix="job", dir="/tmp"))
    yield folder
    _, left = psutil.wait_procs(list(running(folder)), timeout=15)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(folder)
    assert left == []


def running(folder: Path) -> Iterator[psutil.Process]:
    """Processes of the job, which have its folder in their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == str(folder):
                yield process


@contextlib.contextmanager
def submitted(folder: Path, steps: int) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The script as Slurm would run it on the first of two nodes. Each engine needs all cores of a node."""
    port = free_port()
    (folder / "srun").write_text(SRUN, encoding="utf-8")
    (folder / "srun").chmod(0o755)
    (folder / "service.toml").write_text(
        f"""extends = "{ROOT}/deploy/demo/service.toml"
port = {port}
engines = 2
[engine]
cores = {CORES}
[drafter]
kind = "none"
""",
        encoding="utf-8",
    )
    (folder / "train.toml").write_text(
        f"""extends = "{ROOT}/deploy/demo/train.toml"
endpoint = "http://127.0.0.1:{port}"
output = "{folder}/run"
steps = {steps}
prompts_per_step = 4
completions = 4
evaluate_every = 0
[sampling]
max_tokens = 16
""",
        encoding="utf-8",
    )
    environment = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "SLURM_JOB_ID": folder.name,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURMD_NODENAME": "127.0.0.1",
        "SERVICE": str(folder / "service.toml"),
        "TRAIN": str(folder / "train.toml"),
        "ENGINE_GPUS": "",
        "LEARNER_GPUS": "",
        "PORT": str(free_port()),
    }
    environment.pop("RAY_ADDRESS", None)
    log = folder / "log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            ["bash", "deploy/cluster/slurm.sh"], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process, log
        finally:
            process.terminate()
            process.wait(60)


def finished_steps(folder: Path) -> list[int]:
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.mark.again
def test_two_nodes_train_and_the_job_ends_with_the_learner(job):
    with submitted(job, steps=2) as (process, log):
        assert process.wait(WITHIN) == 0, log.read_text()
        assert "with 2 engine(s)" in log.read_text()
    assert finished_steps(job) == [1, 2]
    assert not (ROOT / f".ray-token-{job.name}").exists()


@pytest.mark.again
def test_a_job_that_slurm_ends_leaves_a_checkpoint(job):
    with submitted(job, steps=1000) as (process, log):
        wait_until(lambda: finished_steps(job) or process.poll() is not None, WITHIN, "a step")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, log.read_text()
    assert (job / "run" / "checkpoints" / f"step-{finished_steps(job)[-1]:06}").is_dir()
