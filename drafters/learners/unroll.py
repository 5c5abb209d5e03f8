"""Unrolled draft steps of a head, each on what the head made in the step before (Eagle3, arXiv 2503.01840).

While drafting, a head has seen the policy's hidden states up to row i, then only its own. So at step j the query of row
i (at position i + j) attends to the keys of step 0 of rows <= i, and to its own row's keys of steps 1..j:

    step 0   causal            step 1   causal | own       step 2   causal | own | own
             x . .                      x . . | x . .
             x x .                      x x . | . x .
             x x x                      x x x | . . x

Each step is T queries over T (j + 1) keys, the keys held by a `DynamicCache` that grows by one block a step.
"""

from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from drafters.learners.learner import shifted


class HeadStep(Protocol):
    def __call__(
        self, tokens_BT: Tensor, hidden_BTD: Tensor, positions_T: Tensor, mask_TK: Tensor, keys: DynamicCache
    ) -> tuple[Tensor, Tensor]:
        """One forward of the head: what its output head reads [B, T, D], and what it feeds to its next step.

        `mask_TK` is True where a query may attend, over the keys held so far and this step's own.
        """


def unroll(step: HeadStep, tokens_BT: Tensor, hidden_BTD: Tensor, steps: int) -> list[Tensor]:
    """What the output head reads [B, T, D] at each draft step; `hidden_BTD` is what step 0 is fed of the policy."""
    rows_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    own_TT = rows_T[:, None] == rows_T
    mask_TK = rows_T[:, None] >= rows_T
    keys, states = DynamicCache(), []
    for j in range(steps):
        states_BTD, hidden_BTD = step(shifted(tokens_BT, j + 1), hidden_BTD, rows_T + j, mask_TK, keys)
        states.append(states_BTD)
        mask_TK = torch.cat([mask_TK, own_TT], dim=1)
    return states
