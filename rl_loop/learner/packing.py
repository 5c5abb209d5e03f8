"""Packed micro-batches: the tokens of all rollouts in one row, without padding, and each prompt once.

    rollouts   P P a a a     P P b     Q c c        two of a group with prompt P, and one of another group
    forward    P P a a a b Q c c                    S tokens; indices 0 to 8
    positions  0 1 2 3 4 2 0 1 2
    blocks     P P a a a                            a token attends to its own rollout, up to itself
               P P b
               Q c c

A token's hidden states depend only on what comes before it in its rollout. So a prompt has the same hidden states in
every completion of its group. The whole model is therefore computed on the S tokens. Only attention sees rollouts: it
looks up padded blocks of queries, keys and values (rl_loop/learner/packed_attention.py). In the backward pass, the
gradients of a group's completions add up in its prompt.

If the rollouts have routed experts (rl_loop/learner/router_replay.py), prompts are shared where these are equal too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_loop.batching import MicroBatch, Rollout, block_of, by_length, experts_of

Prompt = tuple[tuple[int, ...], bytes]
"""token ids, and the experts that were chosen for them"""


def prompt_of(rollout: Rollout) -> Prompt:
    experts = b"" if rollout.experts is None else rollout.experts[: len(rollout.prompt_ids)].tobytes()
    return tuple(rollout.prompt_ids), experts


@dataclass(frozen=True)
class PackedBatch(MicroBatch):
    tokens_S: Tensor
    """int64"""
    positions_S: Tensor
    """int64"""
    block_indices_S: Tensor
    """int64: each token's index in the flattened blocks; for a prompt's tokens, in the first of its rows"""

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """Call this within `packed_attention(model)`."""
        decoder: Any = model.get_decoder()
        output = decoder(
            input_ids=self.tokens_S[None],
            position_ids=self.positions_S[None],
            use_cache=False,
            indices=[block.indices_BT for block in self.blocks],
            block_indices_S=self.block_indices_S,
        )
        return output.last_hidden_state[0].index_select(0, self.predicts_N)


def packed_batches(rollouts: Sequence[Rollout], max_tokens: int) -> list[PackedBatch]:
    """Batches of at most `max_tokens` tokens each (or of one row), prompt by prompt."""
    first: dict[Prompt, int] = {}
    prompts = [prompt_of(rollout) for rollout in rollouts]
    order = sorted(range(len(rollouts)), key=lambda row: first.setdefault(prompts[row], row))
    batches: list[list[int]] = []
    tokens = 0
    for row in order:
        is_shared = bool(batches) and prompts[row] == prompts[batches[-1][-1]]
        more = len(rollouts[row].response_ids) if is_shared else len(rollouts[row])
        if batches and tokens + more <= max_tokens:
            batches[-1].append(row)
            tokens += more
        else:
            batches.append([row])
            tokens = len(rollouts[row])
    return [_pack(rollouts, batch) for batch in batches]


def _pack(rollouts: Sequence[Rollout], rows: list[int]) -> PackedBatch:
    prompts: dict[Prompt, int] = {}
    starts: dict[int, tuple[int, int]] = {}
    size = 0
    for row in rows:
        prompt = prompt_of(rollouts[row])
        if prompt not in prompts:
            prompts[prompt] = size
            size += len(rollouts[row].prompt_ids)
        starts[row] = (prompts[prompt], size)
        size += len(rollouts[row].response_ids)
    parts = by_length(rollouts, rows)
    blocks = [block_of([rollouts[row] for row in part], [starts[row] for row in part]) for part in parts]
    tokens, real, indices, columns = (
        torch.cat([tensor.flatten() for tensor in tensors])
        for tensors in (
            [block.tokens_BT for block in blocks],
            [block.real_BT for block in blocks],
            [block.indices_BT for block in blocks],
            [torch.arange(block.tokens_BT.shape[1]).expand_as(block.tokens_BT) for block in blocks],
        )
    )
    filled = real.nonzero().squeeze(1)
    block_indices_S = filled.new_zeros(size).scatter_reduce(0, indices[filled], filled, "amin", include_self=False)
    rows = [row for part in parts for row in part]
    return PackedBatch(
        rows=rows,
        lengths=[len(rollouts[row].response_ids) for row in rows],
        responses_N=torch.cat([block.tokens_BT[block.response_BT] for block in blocks]),
        blocks=blocks,
        experts_SLK=experts_of([rollouts[row] for row in starts], list(starts.values()), size),
        tokens_S=tokens[block_indices_S],
        positions_S=columns[block_indices_S],
        predicts_N=torch.cat([block.indices_BT[block.predicts_BT] for block in blocks]),
        block_indices_S=block_indices_S,
    )
