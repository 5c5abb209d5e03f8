"""What every policy loss takes and gives: per-token terms, before they are averaged.

N counts the response tokens of a micro-batch, row after row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInput:
    logprobs_N: Tensor
    """float32, with gradient: of the policy that is trained"""
    old_logprobs_N: Tensor
    """float32: of the policy that the ratio is taken to (the proximal one), without gradient"""
    advantages_N: Tensor
    """float32, the same for all tokens of a row"""
    lengths: list[int]
    """response tokens of each row; they add up to N"""
    clip_low: float
    clip_high: float

    @property
    def lengths_N(self) -> Tensor:
        """int64: of its row, for each token"""
        lengths = torch.tensor(self.lengths, device=self.logprobs_N.device)
        return lengths.repeat_interleave(lengths)


@dataclass(frozen=True)
class LossTerms:
    loss_N: Tensor
    """with gradient; to be averaged"""
    clipped_N: Tensor
    """bool: tokens whose gradient the clip removes or bounds"""
