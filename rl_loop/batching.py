"""Rollouts as padded micro-batches: sorted by length, under a token budget, with little padding.

B rows, T columns, N response tokens. Rows are padded on the right, so position ids count from 0 in every row and
nothing real attends to padding. (Rows are not packed into one sequence: models with linear attention need them apart.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BATCH_COST = 256
"""tokens of padding that take as long as one more forward and backward does, whatever is in it"""


@dataclass(frozen=True)
class Rollout:
    """One completion as the learner sees it. Example: `Rollout([5, 6], [7, 1], [-0.1, -2.3])`."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    """of the response's tokens, as the service reported them"""
    versions: list[int] = field(default_factory=list)
    """weight version that sampled each token of the response; empty when not known"""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class MicroBatch:
    rows: list[int]
    """indices into the rollouts; per-token tensors (N,) are in this order"""
    tokens_BT: Tensor
    """int64"""
    attention_BT: Tensor
    """int64: 1 on tokens, 0 on padding"""
    columns_C: Tensor
    """int64: the columns whose logits are needed, those that predict a response token of any row"""
    predicts_BC: Tensor
    """bool: where a row's logits at these columns predict one of its response tokens"""
    responses_N: Tensor
    """int64: the predicted tokens"""
    lengths: list[int]
    """response tokens of each row"""

    def to(self, device: torch.device) -> "MicroBatch":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return MicroBatch(rows=self.rows, lengths=self.lengths, **tensors)


def microbatches(rollouts: Sequence[Rollout], max_tokens: int) -> list[MicroBatch]:
    """The rollouts, longest first, each batch of at most `max_tokens` padded tokens (or of one row). A row begins a new
    batch where it would bring the padding in the old one above BATCH_COST."""
    by_length = sorted(range(len(rollouts)), key=lambda row: (-len(rollouts[row]), row))
    batches: list[list[int]] = []
    width = padding = 0
    for row in by_length:
        shorter = width - len(rollouts[row])
        if batches and (len(batches[-1]) + 1) * width <= max_tokens and padding + shorter <= BATCH_COST:
            batches[-1].append(row)
            padding += shorter
        else:
            batches.append([row])
            width, padding = len(rollouts[row]), 0
    return [_pad(rollouts, batch) for batch in batches]


def _pad(rollouts: Sequence[Rollout], rows: list[int]) -> MicroBatch:
    width = max(len(rollouts[row]) for row in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
    attention_BT = torch.zeros_like(tokens_BT)
    predicts_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for b, row in enumerate(rows):
        rollout = rollouts[row]
        tokens_BT[b, : len(rollout)] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        attention_BT[b, : len(rollout)] = 1
        predicts_BT[b, len(rollout.prompt_ids) - 1 : len(rollout) - 1] = True
    first = min(len(rollouts[row].prompt_ids) for row in rows) - 1
    columns_C = torch.arange(first, width - 1)
    responses = [torch.tensor(rollouts[row].response_ids) for row in rows]
    return MicroBatch(
        rows=rows,
        tokens_BT=tokens_BT,
        attention_BT=attention_BT,
        columns_C=columns_C,
        predicts_BC=predicts_BT[:, columns_C],
        responses_N=torch.cat(responses),
        lengths=[len(response) for response in responses],
    )
