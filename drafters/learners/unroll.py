"""Unrolled draft steps of a head: each step reads the output of the step before (Eagle3, arXiv 2503.01840).

A head that drafts has read the policy's hidden states up to row i, and only its own after that. So at step j, the query
of row i (at position i + j) attends to the keys of step 0 of rows <= i, and to the keys of its own row in steps 1..j:

    step 0   causal            step 1   causal | own       step 2   causal | own | own
             x . .                      x . . | x . .
             x x .                      x x . | . x .
             x x x                      x x x | . . x

Step j has T queries over T (j + 1) keys. A `DynamicCache` holds the keys and grows by one block of T in each step.
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
        """One forward pass of the head. Returns the input of its output head [B, T, D] and the input of the next step.

        `mask_TK` is True where a query may attend. K counts the keys held so far and those of this step.
        """


def unroll(step: HeadStep, tokens_BT: Tensor, hidden_BTD: Tensor, steps: int) -> list[Tensor]:
    """The input of the output head [B, T, D] at each draft step. `hidden_BTD` is what step 0 reads of the policy."""
    rows_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    own_TT = rows_T[:, None] == rows_T
    mask_TK = rows_T[:, None] >= rows_T
    keys, states = DynamicCache(), []
    for j in range(steps):
        states_BTD, hidden_BTD = step(shifted(tokens_BT, j + 1), hidden_BTD, rows_T + j, mask_TK, keys)
        states.append(states_BTD)
        mask_TK = torch.cat([mask_TK, own_TT], dim=1)
    return states
