"""Inputs of every policy loss, and its per-token terms before they are averaged. Imports torch only when it computes.

N counts the response tokens of a micro-batch, row after row. B counts its rows, which are one response each.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossInput:
    logprobs_N: "Tensor"
    """float32, with gradient: under the policy that is trained"""
    old_logprobs_N: "Tensor"
    """float32, without gradient: under the proximal policy, the denominator of the ratio"""
    advantages_N: "Tensor"
    """float32: the same for all tokens of a row"""
    lengths: list[int]
    """number of response tokens of each row; they add up to N"""

    @property
    def lengths_N(self) -> "Tensor":
        """int64: for each token, the length of its response"""
        import torch

        return self.spread_N(torch.tensor(self.lengths, device=self.logprobs_N.device))

    def response_means_B(self, values_N: "Tensor") -> "Tensor":
        """The mean of `values_N` over each response."""
        import torch

        return torch.stack([row.mean() for row in values_N.split(self.lengths)])

    def spread_N(self, values_B: "Tensor") -> "Tensor":
        """For each token, the value of its response."""
        import torch

        return values_B.repeat_interleave(torch.tensor(self.lengths, device=values_B.device))


@dataclass(frozen=True)
class LossTerms:
    loss_N: "Tensor"
    """float32, with gradient: the terms to be averaged"""
    clipped_N: "Tensor"
    """bool: tokens whose gradient the clip removes or bounds"""
