"""Where rollouts come from: the service, or a folder of recorded groups. The loop knows only `RolloutSource`.

A batch is the groups of one step or evaluation; its groups' ids are its name and a number: `train-000003-00017`.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rl_loop.loops.ownership import Ownership
from rollout_service.client import GroupStream, RolloutError, tensors_checksum
from rollout_service.protocol import ErrorBody, Group, GroupRequest

logger = logging.getLogger("rl_loop")

Tensors = Callable[[torch.dtype], Mapping[str, Tensor]]


class ReplayError(RuntimeError):
    """The recording does not hold what was asked for."""


class RolloutSource(Protocol):
    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        """The finished groups of a batch, in any order. Closing the generator ends the generation of the rest.

        Raises RolloutError at the end when some failed; `failed` says which.
        """

    def publish(self, tensors: Tensors, version: int) -> int:
        """Let later rollouts be sampled by `tensors`; `version` is the last one known. Returns the new version."""

    def publish_drafter(self, tensors: Tensors, version: int, *, is_new: bool) -> int:
        """Let later rollouts be drafted by `tensors`; the drafter's versions count apart from the policy's. Unless
        `is_new`, the engines may hold these very tensors."""


def delivered(groups: Iterable[Group]) -> Generator[Group]:
    """The groups of a batch, without those that failed, which are told. Raises RolloutError when all failed, or the
    stream did: a step goes on with fewer groups, but not with none."""
    count = 0
    try:
        for group in groups:
            count += 1
            yield group
    except RolloutError as error:
        if not error.failed or count == 0:
            raise
        logger.warning("going on with the other %d groups: %s", count, error)


class EndpointSource:
    """The rollout service, whose weights are the run's own."""

    def __init__(self, ownership: Ownership):
        self.ownership, self.client = ownership, ownership.client

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        """Raises ForeignWeights for a group that other weights sampled than those published."""
        with closing(self.client.rollouts(requests)) as groups:
            for group in groups:
                self.ownership.check([group])
                yield group

    def publish(self, tensors: Tensors, version: int) -> int:
        """The service's versions only grow: the new one is above its own and ours, whichever was restarted. Raises
        RolloutError (409) when the weights in service belong to another run."""
        status = self.client.weights()
        version = max(version, status.policy.version) + 1
        self.ownership.push("policy", tensors(getattr(torch, status.dtype)), version)
        return version

    def publish_drafter(self, tensors: Tensors, version: int, *, is_new: bool) -> int:
        """As `publish`, for the drafter alone. One that is not new is pushed unless the service holds the same bytes.

        Raises RolloutError when the service's drafter has no weights of its own.
        """
        status = self.client.weights()
        if status.drafter is None:
            raise RolloutError(409, ErrorBody(error="no drafter with weights of its own; start the service with one"))
        pushed = tensors(getattr(torch, status.dtype))
        if not is_new and tensors_checksum(pushed) == status.drafter.checksum:
            return status.drafter.version
        version = max(version, status.drafter.version) + 1
        self.ownership.push("drafter", pushed, version)
        return version


class ReplaySource:
    """Groups that a Recorder wrote, in the order they arrived in. Publishing changes nothing but the version."""

    def __init__(self, folder: Path):
        self.folder = folder

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        file = self.folder / f"{batch}.jsonl"
        if not file.is_file():
            raise ReplayError(f"no recorded batch {file}")
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
            raise ReplayError(f"{file}: {len(groups)} of the {len(wanted)} groups of this batch")
        yield from groups
        if failed:
            raise RolloutError(422, ErrorBody(error=f"{len(failed)} groups failed when it was recorded"), failed=failed)

    def publish(self, tensors: Tensors, version: int) -> int:
        return version + 1

    def publish_drafter(self, tensors: Tensors, version: int, *, is_new: bool) -> int:
        return version + 1


class Recorder:
    """Another source, with every group written to `folder`, a file a batch, as the service's stream: one JSON line a
    group, and an ErrorBody for each that failed."""

    def __init__(self, source: RolloutSource, folder: Path):
        self.source, self.folder = source, folder
        folder.mkdir(parents=True, exist_ok=True)

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        with (self.folder / f"{batch}.jsonl").open("w", encoding="utf-8") as file:
            try:
                for group in self.source.rollouts(batch, requests):
                    file.write(group.model_dump_json() + "\n")
                    yield group
            except RolloutError as error:
                file.writelines(failure.model_dump_json() + "\n" for failure in error.failed)
                raise

    def publish(self, tensors: Tensors, version: int) -> int:
        return self.source.publish(tensors, version)

    def publish_drafter(self, tensors: Tensors, version: int, *, is_new: bool) -> int:
        return self.source.publish_drafter(tensors, version, is_new=is_new)
