"""Record of a training run with faults: what service, trainer and an onlooker wrote down, and what must hold of it.

    python tests/integration/faults/record.py FILE      checks a record that was kept

Groups are counted from two independent logs: the queue's (a table of its database) and the trainer's (groups.jsonl).
"""

import gzip
import sys
from collections import Counter
from pathlib import Path

from bad_requests import RUN
from pydantic import BaseModel

from drafters.files.text_lines import json_lines
from rollout_service.queue.batch_queue import BatchQueue


class Fault(BaseModel):
    kind: str
    seconds: float
    """from the fault until the run had finished another step"""
    steps: int
    """finished by then"""


class Step(BaseModel):
    step: int
    version: int
    staleness: list[int]
    """groups that were so many versions old, from 0"""


class Used(BaseModel):
    groups: list[str]
    """trained on"""
    spent: list[str]
    """acknowledged without being trained on"""


class Record(BaseModel):
    machine: str
    seed: int
    nodes: int
    """Ray nodes beside the head; 0 if the service started Ray itself"""
    faults: list[Fault]
    accepted: list[str]
    """the service's log: each group that was accepted"""
    acknowledged: list[str]
    """the service's log: each acknowledgement"""
    left: list[str]
    """groups in the service's queue at the end"""
    steps: list[Step]
    """the trainer's log of metrics"""
    used: list[Used]
    """the trainer's log of groups, by step"""
    versions: list[int]
    """of the policy, as an onlooker saw them change"""

    @classmethod
    def read(cls, file: Path) -> "Record":
        return cls.model_validate_json(gzip.decompress(file.read_bytes()))

    def write(self, file: Path) -> None:
        file.write_bytes(gzip.compress(self.model_dump_json().encode(), mtime=0))

    def check(self) -> None:
        """Raises AssertionError with what does not hold."""
        self.check_groups()
        self.check_versions()

    def check_groups(self) -> None:
        """Each accepted group was used once or is still there, and no problem was left out."""
        trained = Counter(name for step in self.used for name in step.groups)
        spent = Counter(name for step in self.used for name in step.spent)
        accepted, acknowledged, left = Counter(self.accepted), Counter(self.acknowledged), set(self.left)
        assert len(trained) > 10
        assert max((trained + spent).values()) == 1, "a group is used twice"
        assert max(accepted.values()) == 1, "a group is accepted twice"
        assert max(acknowledged.values()) == 1, "a group is acknowledged twice"
        assert set(acknowledged) <= set(trained) | set(spent), "a group is acknowledged and was not used"
        assert set(accepted) == set(acknowledged) | left, "a group is lost"
        assert not left & set(acknowledged), "a group is acknowledged and still in the queue"
        indices = sorted(int(name.removeprefix("train-")) for name in trained + spent)
        # All problems in order were used, except those that were on their way when the run ended.
        missing = set(range(indices[-1])) - set(indices)
        assert {f"train-{index:09d}" for index in missing} <= left, "a problem was left out"

    def check_versions(self) -> None:
        """Versions in service and those trained on only grew, and no step is missing or trained on groups too old."""
        assert len(self.versions) > 10, "nobody looked"
        assert self.versions == sorted(self.versions), "a version in service went backwards"
        assert [step.step for step in self.steps] == list(range(1, len(self.steps) + 1)), "a step is missing"
        assert [s.version for s in self.steps] == sorted(s.version for s in self.steps), (
            "a step's version went backwards"
        )
        assert all(len(step.staleness) <= 2 for step in self.steps), "a group is older than one version"

    def in_words(self) -> str:
        counts = Counter(fault.kind for fault in self.faults)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        worst = max(fault.seconds for fault in self.faults)
        used = sum(len(step.groups) + len(step.spent) for step in self.used)
        return (
            f"{len(self.faults)} faults ({kinds}), seed {self.seed}, {self.nodes} node(s) beside the head. After the "
            f"worst, the run finished its next step in {worst:.0f} s. {len(self.accepted)} groups accepted, "
            f"{len(self.acknowledged)} acknowledged, {len(self.left)} left; {used} used by the trainer in "
            f"{len(self.steps)} steps; {len(self.versions)} versions seen."
        )


def record_of(state: Path, output: Path, versions: list[int], **known: object) -> Record:
    """From a service's state folder and a trainer's output folder. Both have ended."""
    queue = BatchQueue(state / "queue.sqlite", capacity=10**6, disk_mib=4096)
    log = [line for line in queue.log() if line["run"] not in ("", RUN) and not line["run"].startswith("filler")]
    left = queue.database.execute("SELECT id FROM groups WHERE state != 'acknowledged' AND run NOT IN ('', ?)", (RUN,))
    names = [name for (name,) in left]
    queue.close()
    return Record(
        accepted=[line["id"] for line in log if line["event"] == "accepted"],
        acknowledged=[line["id"] for line in log if line["event"] == "acknowledged"],
        left=names,
        steps=list(json_lines(output / "metrics.jsonl", Step.model_validate)),
        used=list(json_lines(output / "groups.jsonl", Used.model_validate)),
        versions=versions,
        **known,
    )


if __name__ == "__main__":
    record = Record.read(Path(sys.argv[1]))
    print(record.in_words())
    record.check()
    print("Nothing was lost, nothing was used twice, and versions only grew.")
