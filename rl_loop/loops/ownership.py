"""Ownership: which run a service's weights belong to, and the check that no other run's weights sampled a batch.

- The service accepts a push only from the run that owns its weights. A new run takes over only with `take_over`. The
  previous owner then ends with an error at its next push or its next rollout.
- A run that ends by its last step, a signal or an error releases its weights: they stay in service, and the next run
  may push. A killed run keeps its ownership until it is resumed and ends, or another run takes over.
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
"""most characters of the output folder's name in the run's name"""


class ForeignWeights(RuntimeError):
    """Weights that this run did not push sampled some of its tokens."""


class Ownership:
    """The Publisher of a live service. Call `check` on all groups that the service returns."""

    def __init__(self, client: RolloutClient, run: str, take_over: bool = False, pushed: Iterable[int] = ()):
        """`pushed`: versions of the policy that the run pushed before it was resumed."""
        self.client, self.run = client, run
        self.lock = threading.Lock()
        self.to_take_over: set[WeightsOf] = {"policy", "drafter"} if take_over else set()
        """weight sets whose first push takes over; later pushes do not, so that a later owner is not driven out"""
        self.pushed = set(pushed)
        """versions of the policy, including those whose push is not answered yet"""

    def publish(self, of: WeightsOf, export: Export, version: int, *, is_new: bool = True) -> int:
        """Push the export under a version above both the service's version and `version`, since versions only grow.
        Unless `is_new`, the export is pushed only if the service holds other bytes.

        Raises RolloutError (409) when the weights in service belong to another run, and when the service's drafter has
        no weights of its own.
        """
        status = self.client.weights()
        in_service = status.policy if of == "policy" else status.drafter
        if in_service is None:
            raise RolloutError(
                409, ErrorBody(error="there is no drafter with its own weights; start the service with one")
            )
        tensors = export(getattr(torch, status.dtype))
        if not is_new and tensors_checksum(tensors) == in_service.checksum:
            return in_service.version
        version = max(version, in_service.version) + 1
        self.push(of, tensors, version)
        return version

    def push(self, of: WeightsOf, tensors: Mapping[str, Tensor], version: int) -> WeightStatus:
        """Push under exactly this version. Raises RolloutError (409) when it is not above the version in service, and
        when the weights in service belong to another run."""
        if of == "policy":
            with self.lock:
                self.pushed.add(version)
        status = self.client.push_weights(of, tensors, version, self.run, of in self.to_take_over)
        self.to_take_over.discard(of)
        return status

    def holds(self, policy: WeightStatus) -> bool:
        """Whether this run pushed the policy in service."""
        return policy.run == self.run or (policy.run is None and policy.version in self.pushed)

    def go_on_from(self, policy: WeightStatus, max_staleness: int) -> None:
        """Count as pushed what the run pushed after its checkpoint: `policy`, and the versions before it that may have
        sampled tokens."""
        with self.lock:
            self.pushed |= set(range(max(1, policy.version - max_staleness), policy.version + 1))

    def recent(self, max_staleness: int) -> list[int]:
        """The pushed versions that may have sampled tokens not yet trained on."""
        with self.lock:
            newest = max(self.pushed, default=0)
            return sorted(version for version in self.pushed if version >= newest - max_staleness)

    def check(self, groups: Iterable[Group]) -> None:
        """Raises ForeignWeights when a version that this run did not push sampled a token. A version whose push is not
        answered yet counts as pushed: the caller must then wait for the answer."""
        with self.lock:
            foreign = {v: group.id for group in groups for v in versions_of(group) if v not in self.pushed}
            newest = max(self.pushed, default=0)
        if not foreign:
            return
        version, group = max(foreign.items())
        in_service = self.client.weights().policy
        owner = f"the run {in_service.run!r}" if in_service.run else "no run"
        raise ForeignWeights(
            f"version {version} of the policy sampled tokens of {group}, but this run, {self.run!r}, did not push it: "
            f"its newest is version {newest}. The service now has version {in_service.version} of {owner}. "
            "None of these tokens was trained on. Continue with --resume, and with --take_over if the service still "
            "belongs to another run"
        )

    def release(self) -> None:
        """Give up ownership at the end of the run. Its weights stay in service, and the next run may push."""
        try:
            self.client.release_weights(self.run)
        except (httpx.TransportError, RolloutError) as error:
            logger.warning(
                "the service was not told that run %r ended; the next run needs --take_over: %s", self.run, error
            )


def versions_of(group: Group) -> set[int]:
    """Weight versions that sampled its tokens."""
    return {span.version for completion in group.completions for span in completion.weight_versions}


def new_run(output: Path) -> str:
    """A unique name for a run: the output folder's name, for people, and random digits."""
    folder = re.sub(r"[^\w.-]", "_", output.resolve().name)[:LONGEST_FOLDER]
    return f"{folder}-{uuid.uuid4().hex[:12]}"
