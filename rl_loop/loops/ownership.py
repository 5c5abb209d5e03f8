"""Ownership: which run a service's weights belong to, and the check that no other sampled what a run trains on.

- The service refuses a push of another run than the one that its weights belong to. A run that begins takes over only
  if it is told to; the other one's next push, or its next rollout, then ends it.
- A run that ends in order, by its last step, a signal or an error, releases its weights: they stay in service, and
  the next run may push. One that was killed holds them until it goes on, or another takes over.
"""

import logging
import re
import threading
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import httpx
import torch
from torch import Tensor

from rl_loop.loops.publishing import Export
from rollout_service.client import RolloutClient, RolloutError, tensors_checksum
from rollout_service.protocol import ErrorBody, Group, WeightsOf, WeightStatus

logger = logging.getLogger("rl_loop")

LONGEST_FOLDER = 64
"""characters of the output folder's name in a run's"""


class ForeignWeights(RuntimeError):
    """Tokens were sampled by weights that this run did not push."""


class Ownership:
    """The Publisher of a live service. `check(groups)` is to be called for all that comes back."""

    def __init__(self, client: RolloutClient, run: str, take_over: bool = False, pushed: Iterable[int] = ()):
        """`pushed`: versions of the policy that the run pushed before it was resumed."""
        self.client, self.run = client, run
        self.lock = threading.Lock()
        self.to_take_over: set[WeightsOf] = {"policy", "drafter"} if take_over else set()
        """weight sets whose first push is to take over; once they are ours, whoever comes later is not driven out"""
        self.pushed = set(pushed)
        """versions of the policy, those included whose push is not answered yet"""

    def publish(self, of: WeightsOf, export: Export, version: int, *, is_new: bool = True) -> int:
        """The service's versions only grow: the new one is above its own and ours, whichever was restarted. What is not
        new is pushed unless the service holds the same bytes.

        Raises RolloutError (409) when the weights in service belong to another run, and when the service's drafter has
        no weights of its own.
        """
        status = self.client.weights()
        in_service = status.policy if of == "policy" else status.drafter
        if in_service is None:
            raise RolloutError(409, ErrorBody(error="no drafter with weights of its own; start the service with one"))
        tensors = export(getattr(torch, status.dtype))
        if not is_new and tensors_checksum(tensors) == in_service.checksum:
            return in_service.version
        version = max(version, in_service.version) + 1
        self.push(of, tensors, version)
        return version

    def push(self, of: WeightsOf, tensors: Mapping[str, Tensor], version: int) -> WeightStatus:
        """As this very version. Raises RolloutError (409) when it is not above the one in service, and when the weights
        in service belong to another run."""
        if of == "policy":
            with self.lock:
                self.pushed.add(version)
        status = self.client.push_weights(of, tensors, version, self.run, of in self.to_take_over)
        self.to_take_over.discard(of)
        return status

    def holds(self, policy: WeightStatus) -> bool:
        """Whether the policy in service is one that this run pushed."""
        return policy.run == self.run or (policy.run is None and policy.version in self.pushed)

    def go_on_from(self, policy: WeightStatus, max_staleness: int) -> None:
        """Count as pushed what the run pushed after its checkpoint: `policy`, which it holds, and those before it that
        tokens may have."""
        with self.lock:
            self.pushed |= set(range(max(1, policy.version - max_staleness), policy.version + 1))

    def recent(self, max_staleness: int) -> list[int]:
        """The pushed versions that tokens trained on from here on may have."""
        with self.lock:
            newest = max(self.pushed, default=0)
            return sorted(version for version in self.pushed if version >= newest - max_staleness)

    def check(self, groups: Iterable[Group]) -> None:
        """Raises ForeignWeights when a token was sampled by a version that this run did not push. A version counts
        whose push is still under way: who checks then has to await how it ends."""
        with self.lock:
            foreign = {v: group.id for group in groups for v in versions_of(group) if v not in self.pushed}
            newest = max(self.pushed, default=0)
        if not foreign:
            return
        version, group = max(foreign.items())
        in_service = self.client.weights().policy
        owner = f"the run {in_service.run!r}" if in_service.run else "no run"
        raise ForeignWeights(
            f"version {version} of the policy sampled tokens of {group}, and this run, {self.run!r}, did not push it: "
            f"its newest is version {newest}. In service is version {in_service.version} of {owner}. "
            "None of these tokens was trained on. Go on with --resume, and with --take_over if the service still "
            "belongs to another run"
        )

    def release(self) -> None:
        """The run ends: its weights stay in service, and the next run may push."""
        try:
            self.client.release_weights(self.run)
        except (httpx.TransportError, RolloutError) as error:
            logger.warning(
                "the service did not hear that run %r ended; the next needs --take_over: %s", self.run, error
            )


def versions_of(group: Group) -> set[int]:
    """Weight versions that sampled its tokens."""
    return {span.version for completion in group.completions for span in completion.weight_versions}


def new_run(output: Path) -> str:
    """A run's name, which no other run has: the output folder's, for people, and some random digits."""
    folder = re.sub(r"[^\w.-]", "_", output.resolve().name)[:LONGEST_FOLDER]
    return f"{folder}-{uuid.uuid4().hex[:12]}"
