"""Micro-batches of rollouts: the input of one forward pass, and where each rollout's tokens are in it.

Padded micro-batches (rl_loop/learner/padding.py) have a row for each rollout, and any model takes them. Packed ones
(learner/packing.py) have all tokens in one row and each prompt once. Only models with full attention in every layer
take these.

B rows, T columns, N response tokens, D hidden size. Rows are padded on the right, so position ids count from 0 in every
row, and no token of a rollout attends to padding. A token's index is its place in the forward pass, row after row.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH_COST = 256
"""padding tokens that take as long as the fixed cost of one more forward and backward pass. Measured for padded
micro-batches; it also serves for the blocks of packed ones, where only attention sees padding"""


@dataclass(frozen=True)
class Rollout:
    """One completion as the learner sees it. Example: `Rollout([5, 6], [7, 1], [-0.1, -2.3])`."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    """log-probabilities of the response's tokens, as the service reported them"""
    versions: list[int] = field(default_factory=list)
    """the weight version that sampled each token of the response; empty when not known"""
    experts: np.ndarray | None = field(default=None, compare=False)
    """integers (T, L, K): the K experts that the engine's routers chose in each of L layers, for all tokens but the
    last; None when not known"""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Block:
    """Rollouts of similar length, one per row."""

    tokens_BT: Tensor
    """int64"""
    real_BT: Tensor
    """bool: False on padding"""
    response_BT: Tensor
    """bool: which tokens are response"""
    indices_BT: Tensor
    """int64: each token's index in the forward pass; 0 for padding"""

    @property
    def predicts_BT(self) -> Tensor:
        """bool: True where the next token is a response token"""
        return torch.nn.functional.pad(self.response_BT[:, 1:], (0, 1))

    def to(self, device: torch.device) -> "Block":
        return Block(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class MicroBatch(ABC):
    rows: list[int]
    """indices into the rollouts, block after block; per-token tensors (N,) are in this order"""
    lengths: list[int]
    """number of response tokens of each row"""
    responses_N: Tensor
    """int64"""
    predicts_N: Tensor
    """int64: indices of the tokens from which the response is predicted; a prompt's last token once per completion"""
    blocks: list[Block]
    experts_SLK: Tensor | None
    """int64: `Rollout.experts` of each of S tokens of the forward pass, padding included, and -1 where none are
    known; None if a rollout has none"""

    @abstractmethod
    def hidden(self, model: PreTrainedModel) -> Tensor:
        """The decoder's last hidden states (N, D), from which the head predicts the response tokens."""

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, blocks=[block.to(device) for block in self.blocks], **moved)


def by_length(rollouts: Sequence[Rollout], rows: Sequence[int], max_tokens: float = math.inf) -> list[list[int]]:
    """The rows, longest first, in parts of at most `max_tokens` padded tokens (or of one row). A row begins a new part
    if it would bring the padding in the current one above BATCH_COST."""
    parts: list[list[int]] = []
    width = padding = 0
    for row in sorted(rows, key=lambda row: (-len(rollouts[row]), row)):
        shorter = width - len(rollouts[row])
        if parts and (len(parts[-1]) + 1) * width <= max_tokens and padding + shorter <= BATCH_COST:
            parts[-1].append(row)
            padding += shorter
        else:
            parts.append([row])
            width, padding = len(rollouts[row]), 0
    return parts


def block_of(rollouts: Sequence[Rollout], starts: Sequence[tuple[int, int]]) -> Block:
    """The rollouts as rows. `starts`: the indices of each rollout's first token and of its first response token."""
    tokens_BT = torch.zeros(len(rollouts), max(map(len, rollouts)), dtype=torch.long)
    real_BT, response_BT = (torch.zeros_like(tokens_BT, dtype=torch.bool) for _ in range(2))
    indices_BT = torch.zeros_like(tokens_BT)
    for b, (rollout, (first, response)) in enumerate(zip(rollouts, starts, strict=True)):
        begin, end = len(rollout.prompt_ids), len(rollout)
        tokens_BT[b, :end] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        real_BT[b, :end] = True
        response_BT[b, begin:end] = True
        indices_BT[b, :begin] = torch.arange(first, first + begin)
        indices_BT[b, begin:end] = torch.arange(response, response + end - begin)
    return Block(tokens_BT, real_BT, response_BT, indices_BT)


def experts_of(rollouts: Sequence[Rollout], starts: Sequence[tuple[int, int]], size: int) -> Tensor | None:
    """The experts of a forward pass of `size` tokens, as `MicroBatch` has them. `starts`: as in `block_of`."""
    known = [rollout.experts for rollout in rollouts if rollout.experts is not None]
    if len(known) < len(rollouts):
        return None
    experts_SLK = torch.full((size, *known[0].shape[1:]), -1)
    for rollout, experts, (first, response) in zip(rollouts, known, starts, strict=True):
        prompt, more = torch.from_numpy(experts.astype(np.int64)).tensor_split([len(rollout.prompt_ids)])
        experts_SLK[first : first + len(prompt)] = prompt
        experts_SLK[response : response + len(more)] = more
    return experts_SLK
