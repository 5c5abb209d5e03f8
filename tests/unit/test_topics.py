"""Topics: `make test-TOPIC` exists for every topic that a test may have."""

from pathlib import Path

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


def test_make_has_a_target_for_every_topic(request):
    (line,) = [line for line in MAKEFILE.read_text().splitlines() if line.startswith("TOPICS := ")]
    markers = request.config.getini("markers")
    topics = [marker.split(":")[0] for marker in markers if marker.endswith("runs these")]
    assert line.removeprefix("TOPICS := ").split() == topics
