"""GroupsLog: groups.jsonl, which lists the groups that each step of an asynchronous run trained on or spent."""

import json
from collections.abc import Sequence
from pathlib import Path

from drafters.files.durable import make_folders, replacing
from drafters.files.text_lines import byte_lines

GROUPS_FILE = "groups.jsonl"


class GroupsLog:
    """One line per step. `step` is the number of finished steps in the state that the run resumes from; later lines are
    dropped, since those steps are trained again."""

    def __init__(self, output: Path, step: int):
        make_folders(output)
        self.file = output / GROUPS_FILE
        lines = byte_lines(self.file) if self.file.is_file() else []
        kept = [line for line in lines if line.endswith(b"}") and json.loads(line)["step"] <= step]
        with replacing(self.file) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def step(self, step: int, trained: Sequence[str], spent: Sequence[str]) -> None:
        """Append the names of the step's groups."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "groups": list(trained), "spent": list(spent)}) + "\n")
