"""Attention in float32 with grouped heads on a GPU, by a kernel whose memory is linear in the number of tokens.

torch's only such kernel for float32 on a GPU wants as many heads of keys and values as of queries. transformers hands
it fewer, and torch then takes its math kernel, which keeps a weight for each pair of tokens in each head. So keys and
values are repeated first. Half precision on a GPU, and a CPU, have kernels for grouped heads.

Importing this module replaces transformers' attention function "sdpa" in this process.
"""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


def attend(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`: the output (B, T, H, D) of H heads, which read G heads of keys."""
    if lacks_grouped_kernel(key_BGTD):
        groups = query_BHTD.shape[1] // key_BGTD.shape[1]
        key_BGTD, value_BGTD = repeat_kv(key_BGTD, groups), repeat_kv(value_BGTD, groups)
        module = cast(nn.Module, SimpleNamespace(is_causal=getattr(module, "is_causal", True)))  # without groups
    return sdpa_attention_forward(module, query_BHTD, key_BGTD, value_BGTD, attention_mask, **settings)


def lacks_grouped_kernel(key_BGTD: Tensor) -> bool:
    return key_BGTD.is_cuda and key_BGTD.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")


AttentionInterface.register("sdpa", attend)
