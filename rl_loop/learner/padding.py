"""Padded micro-batches: a row for each rollout, sorted by length, under a token budget, with little padding.

Models with linear attention or a sliding window need them, since their rows must be separate.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_loop.batching import MicroBatch, Rollout, block_of, by_length, experts_of


class PaddedBatch(MicroBatch):
    """A micro-batch of one block."""

    def hidden(self, model: PreTrainedModel) -> Tensor:
        block = self.blocks[0]
        columns_T = torch.arange(block.tokens_BT.shape[1], device=block.tokens_BT.device)
        decoder: Any = model.get_decoder()
        output = decoder(
            input_ids=block.tokens_BT,
            attention_mask=block.real_BT.long(),
            position_ids=columns_T.expand_as(block.tokens_BT),
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, self.predicts_N)


def padded_batches(rollouts: Sequence[Rollout], max_tokens: int) -> list[PaddedBatch]:
    """Batches of at most `max_tokens` tokens each, padding included (or of one row)."""
    return [_pad(rollouts, rows) for rows in by_length(rollouts, range(len(rollouts)), max_tokens)]


def _pad(rollouts: Sequence[Rollout], rows: list[int]) -> PaddedBatch:
    of_rows = [rollouts[row] for row in rows]
    width = max(map(len, of_rows))
    starts = [(b * width, b * width + len(rollout.prompt_ids)) for b, rollout in enumerate(of_rows)]
    block = block_of(of_rows, starts)
    lengths = [len(rollout.response_ids) for rollout in of_rows]
    predicts_N = block.predicts_BT.flatten().nonzero().squeeze(1)
    experts_SLK = experts_of(of_rows, starts, len(of_rows) * width)
    return PaddedBatch(rows, lengths, block.tokens_BT[block.response_BT], predicts_N, [block], experts_SLK)
