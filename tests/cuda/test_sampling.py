"""Sampling on a GPU: the V2 runner's sampler draws from the softmax."""

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from rollout_service.evaluation.goodness_of_fit import g_test


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_sampled_tokens_follow_the_softmax_over_several_blocks(right):
    """A vocabulary of two of the kernel's blocks of 1,024. A distribution at another temperature does not fit."""
    rows, vocabulary = 500, 1100
    logits_V = torch.zeros(vocabulary)
    logits_V[[0, 5, 1023, 1024, 1099]] = torch.tensor([8.0, 7.5, 8.5, 8.2, 7.0])
    seeds_R = torch.arange(rows) * 7919
    temperature_R = torch.full((rows,), 1.0 if right else 2.0)
    tokens_R = gumbel_sample(
        logits_V.repeat(rows, 1), torch.arange(rows), temperature_R, seeds_R, torch.arange(rows) % 50, True, False
    )
    fit = g_test(np.bincount(tokens_R, minlength=vocabulary), logits_V.double().softmax(0).numpy())
    assert (fit.p > 1e-4) if right else (fit.p < 1e-9)
