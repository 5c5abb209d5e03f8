"""`rollout-service selftest` on this machine: every check runs on real engines, and passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines import ROOT


def selftest(tmp_path, *flags):
    """(drafter, check) of each check, all of which passed."""
    output = tmp_path / "selftest.json"
    command = [str(Path(sys.executable).parent / "rollout-service"), "selftest", "--tokens", "2048", *flags]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [(check["drafter"], check["check"]) for check in json.loads(output.read_text())["checks"]]
    assert f"All {len(checks)} checks pass." in done.stdout
    return checks


def test_every_check_of_the_demo_passes_on_this_machine(tmp_path):
    checks = selftest(tmp_path)
    samples = ["temperature 1", "temperature 0.7, top-p 0.9, top-k 20", "temperature 0"]
    laws = "laws of sampler and verification"
    assert checks == [
        *(("none", check) for check in ["start", laws, *samples, "new policy"]),
        *(("mtp", check) for check in ["start", laws, *samples, "draft lengths", "new drafter", "new policy"]),
    ]


@pytest.mark.again
def test_every_check_passes_on_an_engine_of_two_ranks(tmp_path):
    """Each rank samples for itself, so all ranks must draw the same tokens. A push loads a part on each."""
    checks = selftest(tmp_path, "--engine.tensor_parallel_size", "2", "--drafters", "mtp")
    assert [check for _, check in checks][-3:] == ["draft lengths", "new drafter", "new policy"]
