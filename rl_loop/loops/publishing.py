"""Publisher: the interface by which a loop puts weights in service, the policy's and the drafter's.

The publisher for a live service is the run's Ownership (ownership.py). An asynchronous run pushes the policy by it in a
separate thread (pushing.py). The publisher for a recording (recording.py) only counts versions.
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
        """Let these tensors sample later rollouts, or draft them. `version` is the last version known, and the new one
        is returned. Policy and drafter have separate versions. Without `is_new`, the same tensors may already be in
        service."""

    def release(self) -> None:
        """Give up the service at the end of the run. Its weights stay in service, and the next run may publish."""
