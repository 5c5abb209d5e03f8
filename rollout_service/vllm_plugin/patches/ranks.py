"""Patches for the rank of a sampled token among the log-probabilities of its row."""

from importlib import import_module
from typing import Any

import numpy as np
import torch

from rollout_service.vllm_plugin.patch import defect


def ranks_are_not_compiled() -> bool:
    """The function that the sampler calls is a plain one."""
    sampler: Any = import_module("vllm.v1.sample.sampler")
    return not hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")


def batched_count_greater_than(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How many entries of each row of `x` [rows, entries] are not below that row's value in `values` [rows, 1]: int64
    [rows]. It counts row by row, because torch's sum of a boolean matrix is much slower."""
    rows = zip(x.numpy(), values.numpy(), strict=True)
    return torch.tensor([np.count_nonzero(row >= value) for row, value in rows], dtype=torch.int64)


def replace_count() -> None:
    sampler: Any = import_module("vllm.v1.sample.sampler")
    sampler.batched_count_greater_than = batched_count_greater_than


RANKS = [
    defect(
        "vllm.v1.sample.sampler.batched_count_greater_than",
        "it is compiled in an engine's first step with log-probabilities, which takes seconds",
        ranks_are_not_compiled,
        replace_count,
    ),
]
