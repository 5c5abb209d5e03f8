"""Publisher: the interface by which a loop brings weights into service, the policy's and the drafter's.

A live service's publisher is the run's Ownership (ownership.py), which an asynchronous run calls in a thread of its own
(pushing.py). A recording's (recording.py) changes nothing but the versions.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rollout_service.protocol import WeightsOf

Export = Callable[[torch.dtype], Mapping[str, Tensor]]
"""a learner's `export`: tensors by their checkpoint names"""


class Publisher(Protocol):
    def publish(self, of: WeightsOf, export: Export, version: int, *, is_new: bool = True) -> int:
        """Let later rollouts be sampled, or drafted, by these tensors. `version` is the last one known; returns the new
        one. Policy and drafter have versions of their own. Unless `is_new`, these very tensors may be in service."""

    def release(self) -> None:
        """The run ends: what it published stays in service, and the next run may publish."""
