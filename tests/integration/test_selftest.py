"""`rollout-service selftest` on this machine: every check runs on real engines, and passes."""

import json
import subprocess
import sys
from pathlib import Path

from engines import ROOT


def test_every_check_of_the_demo_passes_on_this_machine(tmp_path):
    output = tmp_path / "selftest.json"
    done = subprocess.run(
        [str(Path(sys.executable).parent / "rollout-service"), "selftest", "--tokens", "2048", "--output", str(output)],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [(check["drafter"], check["check"]) for check in json.loads(output.read_text())["checks"]]
    samples = ["temperature 1", "temperature 0.7, top-p 0.9, top-k 20", "temperature 0"]
    laws = "laws of sampler and verification"
    assert checks == [
        *(("none", check) for check in ["start", laws, *samples, "new policy"]),
        *(("mtp", check) for check in ["start", laws, *samples, "draft lengths", "new drafter", "new policy"]),
    ]
    assert f"All {len(checks)} checks pass." in done.stdout
