"""Attention over packed micro-batches (rl_loop/learner/packing.py), as an attention function of transformers.

B rows, T columns, S tokens, H heads (fewer of keys and values than of queries), D channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from drafters.attention import attend

NAME = "packed"
TOKENWISE = {"moe", "mlp"}
"""types of layers, in architectures that count them, that compute each token by itself"""


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model's tokens see each other only by attention, in full, and by a function that can be replaced."""
    config: Any = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    if layers is None:
        is_full = getattr(config, "sliding_window", None) is None and not model._is_stateful
    else:
        is_full = set(layers) - TOKENWISE == {"full_attention"}
    return is_full and config._attn_implementation == "sdpa" and model._can_set_attn_implementation()


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, `model` takes packed micro-batches and nothing else.

    The backward pass must also run within it, since gradient checkpointing computes the forward pass again.
    """
    usual = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def _attend(
    module: nn.Module,
    query_1HSD: Tensor,
    key_1HSD: Tensor,
    value_1HSD: Tensor,
    attention_mask: Tensor | None,
    *,
    indices: Sequence[Tensor],
    block_indices_S: Tensor,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The attention output (1, S, H, D) of each token over its rollout. Rows are causal and padded on the right, so
    they need no mask."""
    assert attention_mask is None, (
        "the model cannot be packed: it makes an attention mask, which may hide more than a causal one"
    )
    # The rotary embedding makes queries float32, and on a CPU they stay float32 despite autocast: the backward pass in
    # bfloat16 takes 2.5 times as long (torch 2.13, AVX512_BF16: 16 ms against 6.5 ms for 32 rows of 100 tokens).
    projections = query_1HSD, key_1HSD.type_as(query_1HSD), value_1HSD.type_as(query_1HSD)
    attended = []
    with torch.autocast("cpu", enabled=False):
        for indices_BT in indices:
            query, key, value = (_look_up(states_1HSD, indices_BT) for states_1HSD in projections)
            attended_BTHD, _ = attend(module, query, key, value, None, **settings)
            attended.append(attended_BTHD.flatten(0, 1))
    return torch.cat(attended).index_select(0, block_indices_S)[None], None


def _look_up(states_1HSD: Tensor, indices_BT: Tensor) -> Tensor:
    """The states at the indices (B, H, T, D). On a CPU, the backward pass of `index_select` is 20 times as fast as that
    of indexing."""
    states_SHD = states_1HSD[0].transpose(0, 1)
    return states_SHD.index_select(0, indices_BT.flatten()).unflatten(0, indices_BT.shape).transpose(1, 2)


AttentionInterface.register(NAME, _attend)
