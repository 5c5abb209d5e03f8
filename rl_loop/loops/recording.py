"""Recordings: a run's groups on disk, and their replay.

rollouts/
  recording.json              the format's number; a folder without it has format 1
  train-000001.jsonl, ...     one batch each, as the service streams it: a JSON line per group, and an ErrorBody for
                              each group that failed
  context.json                max_model_len, if it decided which prompts were skipped
"""

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TextIO

from drafters.files.stored_format import check_format
from rl_loop.loops.publishing import Export, Publisher
from rl_loop.loops.sources import RolloutSource
from rollout_service.client import GroupStream, RolloutError
from rollout_service.protocol import ErrorBody, Group, GroupRequest, SpeculationAlarm, WeightsOf

FORMAT = 1
"""format number of recordings; raise it when older recordings can no longer be read"""
FORMAT_FILE, CONTEXT_FILE = "recording.json", "context.json"


class ReplayError(RuntimeError):
    """The recording does not hold the groups that the run asks for."""


class Recording:
    """A folder to record in."""

    def __init__(self, folder: Path, context_limit: int | None = None):
        """`context_limit`: max_model_len, if overlong prompts are skipped, so that a replay skips the same ones. Raises
        OtherFormat when the folder holds a recording of another format."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        check_recording(folder)
        _write(folder / FORMAT_FILE, {"format": FORMAT})
        if context_limit is not None:
            _write(folder / CONTEXT_FILE, {"max_model_len": context_limit})

    def open(self, batch: str) -> TextIO:
        """Open the batch's file for writing."""
        return (self.folder / f"{batch}.jsonl").open("w", encoding="utf-8")


class Recorder:
    """A source that records the groups of another source as they arrive."""

    def __init__(self, source: RolloutSource, recording: Recording):
        self.source, self.recording = source, recording

    @property
    def publisher(self) -> Publisher:
        return self.source.publisher

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        with self.recording.open(batch) as file:
            try:
                for group in self.source.rollouts(batch, requests):
                    file.write(group.model_dump_json() + "\n")
                    yield group
            except RolloutError as error:
                file.writelines(failure.model_dump_json() + "\n" for failure in error.failed)
                raise


class ReplaySource:
    """The groups of a recording, in the order in which they arrived."""

    def __init__(self, folder: Path):
        """Raises OtherFormat."""
        self.folder, self.publisher = folder, ReplayPublisher()
        check_recording(folder)

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        file = self.folder / f"{batch}.jsonl"
        if not file.is_file():
            raise ReplayError(f"replay: there is no recorded batch {file}")
        wanted = {request.id: request for request in requests}
        recorded = GroupStream(requested=0)
        try:
            groups = [group for group in recorded.feed(file.read_bytes()) if group.id in wanted]
        except RolloutError as error:
            raise ReplayError(f"{file}: {error.body.error}") from error
        failed = [failure for failure in recorded.failed if failure.group in wanted]
        for group in groups:
            request = wanted[group.id]
            if group.metadata != request.metadata or len(group.completions) != request.n:
                raise ReplayError(f"{file}: {group.id} was recorded for another prompt or number of completions")
        if len(groups) + len(failed) < len(wanted):
            raise ReplayError(f"{file}: has only {len(groups)} of the {len(wanted)} groups of this batch")
        yield from groups
        if failed:
            raise RolloutError(
                422, ErrorBody(error=f"{len(failed)} groups had failed when the batch was recorded"), failed=failed
            )

    def context_limit(self) -> int | None:
        """The context length when the rollouts were recorded, in tokens of prompt and response; None if not known."""
        file = self.folder / CONTEXT_FILE
        return _read(file)["max_model_len"] if file.is_file() else None

    def alarms(self) -> list[SpeculationAlarm]:
        return []


class ReplayPublisher:
    """A recording samples nothing, so this only counts versions."""

    def publish(self, of: WeightsOf, export: Export, version: int, *, is_new: bool = True) -> int:
        return version + 1

    def release(self) -> None:
        pass


def check_recording(folder: Path) -> None:
    """Raises OtherFormat when the recording has another format."""
    file = folder / FORMAT_FILE
    check_format(file, _read(file).get("format") if file.is_file() else 1, FORMAT)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")
