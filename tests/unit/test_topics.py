"""Topics: `make test-TOPIC` exists for every topic that a test may have, and every test can be collected."""

import subprocess
import sys
from pathlib import Path

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


def test_make_has_a_target_for_every_topic(request):
    (line,) = [line for line in MAKEFILE.read_text().splitlines() if line.startswith("TOPICS := ")]
    markers = request.config.getini("markers")
    topics = [marker.split(":")[0] for marker in markers if marker.endswith("runs these")]
    assert line.removeprefix("TOPICS := ").split() == topics


def test_every_integration_test_can_be_collected():
    """A file that cannot be imported is found before engines run for half an hour beside it."""
    command = [sys.executable, "-m", "pytest", "tests/integration", "--collect-only", "-q"]
    collected = subprocess.run(command, cwd=MAKEFILE.parent, capture_output=True, text=True, timeout=300)
    assert collected.returncode == 0, collected.stdout[-3000:]
