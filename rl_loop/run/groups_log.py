"""GroupsLog: groups.jsonl, which groups each step of an asynchronous run was trained on, and which were spent."""

import json
from collections.abc import Sequence
from pathlib import Path

from drafters.files.durable import make_folders, replacing
from drafters.files.text_lines import byte_lines

GROUPS_FILE = "groups.jsonl"


class GroupsLog:
    """A line a step. Those after `step`, the finished steps of the state resumed from, are dropped: they come again."""

    def __init__(self, output: Path, step: int):
        make_folders(output)
        self.file = output / GROUPS_FILE
        lines = byte_lines(self.file) if self.file.is_file() else []
        kept = [line for line in lines if line.endswith(b"}") and json.loads(line)["step"] <= step]
        with replacing(self.file) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def step(self, step: int, trained: Sequence[str], spent: Sequence[str]) -> None:
        """The names of the groups."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "groups": list(trained), "spent": list(spent)}) + "\n")
