"""The record of a run with faults: a whole one passes, and every kind of loss is found."""

from pathlib import Path

import pytest
from record import Fault, Record, Step, Used


def name(index: int) -> str:
    return f"train-{index:09d}"


def whole() -> Record:
    """Twelve steps of two groups. The last problem is spent, and another one is still in the queue."""
    used = [Used(groups=[name(2 * i), name(2 * i + 1)], spent=[]) for i in range(11)]
    used.append(Used(groups=[name(22)], spent=[name(24)]))
    acknowledged = [group for step in used for group in (*step.groups, *step.spent)]
    return Record(
        machine="", seed=1, nodes=2, faults=[Fault(kind="node", seconds=3.0, steps=4)],
        accepted=[*acknowledged, name(23)], acknowledged=acknowledged, left=[name(23)],
        steps=[Step(step=i + 1, version=i, staleness=[1, 1]) for i in range(12)], used=used, versions=list(range(12)),
    )  # fmt: skip


def test_a_whole_record_passes_and_is_the_same_when_it_is_read_again(tmp_path):
    record = whole()
    record.check()
    record.write(tmp_path / "record.json.gz")
    assert Record.read(tmp_path / "record.json.gz") == record
    assert "1 faults (1 node), seed 1, 2 node(s)" in record.in_words()


def test_the_kept_record_of_100_faults_of_nodes_is_whole():
    record = Record.read(Path(__file__).parent / "results" / "nodes.json.gz")
    record.check()
    assert (len(record.faults), record.nodes) == (100, 2)
    assert {fault.kind for fault in record.faults} > {"node", "frozen", "cut off", "head", "engine", "front", "trainer"}


def twice(record):
    record.used[3].groups.append(name(1))


def acknowledged_twice(record):
    record.acknowledged.append(name(1))


def lost(record):
    record.left.clear()


def acknowledged_without_use(record):
    record.used[3].groups.remove(name(6))


def left_out(record):
    record.accepted.remove(name(23))
    record.left.clear()


def backwards(record):
    record.versions[5] = 3


def trained_backwards(record):
    record.steps[5].version = 3


def step_missing(record):
    del record.steps[4]


def too_old(record):
    record.steps[4].staleness.append(1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (twice, "used twice"),
        (acknowledged_twice, "acknowledged twice"),
        (lost, "is lost"),
        (acknowledged_without_use, "was not used"),
        (left_out, "left out"),
        (backwards, "in service went backwards"),
        (trained_backwards, "step's version went backwards"),
        (step_missing, "a step is missing"),
        (too_old, "older than one version"),
    ],
)
def test_a_record_that_is_not_whole_fails(damage, said):
    record = whole()
    damage(record)
    with pytest.raises(AssertionError, match=said):
        record.check()
