"""Padded micro-batches: a row for each rollout, sorted by length, under a token budget, with little padding.

Models with linear attention or a sliding window need them, since their rows must be separate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_loop.batching import MicroBatch, Rollout, block_of, by_length


class PaddedBatch(MicroBatch):
    """A micro-batch of one block."""

    def logits(self, model: PreTrainedModel) -> Tensor:
        block = self.blocks[0]
        rows_N, columns_N = block.predicts_BT.nonzero(as_tuple=True)
        first, width = int(columns_N.min()), block.tokens_BT.shape[1]
        columns_T = torch.arange(width, device=columns_N.device)
        output = model(
            input_ids=block.tokens_BT,
            attention_mask=block.real_BT.long(),
            position_ids=columns_T.expand_as(block.tokens_BT),
            logits_to_keep=columns_T[first:-1],
            use_cache=False,
        )
        return output.logits[rows_N, columns_N - first]


def padded_batches(rollouts: Sequence[Rollout], max_tokens: int) -> list[PaddedBatch]:
    """Batches of at most `max_tokens` tokens each, padding included (or of one row)."""
    return [_pad(rollouts, rows) for rows in by_length(rollouts, range(len(rollouts)), max_tokens)]


def _pad(rollouts: Sequence[Rollout], rows: list[int]) -> PaddedBatch:
    of_rows = [rollouts[row] for row in rows]
    width = max(map(len, of_rows))
    block = block_of(of_rows, [(b * width, b * width + len(r.prompt_ids)) for b, r in enumerate(of_rows)])
    lengths = [len(rollout.response_ids) for rollout in of_rows]
    return PaddedBatch(rows, lengths, block.tokens_BT[block.response_BT], [block])
