"""The clipped loss and the k3 divergence, against values worked out by hand."""

import math

import pytest
import torch

from rl_loop.losses import clipped_policy_loss, k3_divergence


def test_clipped_loss_is_the_token_mean_of_the_pessimistic_term():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    advantages = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0])
    result = clipped_policy_loss(ratio.log(), torch.zeros(5), advantages, clip_low=0.2, clip_high=0.3, tokens=5)
    # min(ratio A, clipped A): 2, 1.3 (clipped above), 0.5, -1.5, -0.8 (clipped below)
    assert result.loss.item() == pytest.approx(-(2.0 + 1.3 + 0.5 - 1.5 - 0.8) / 5, abs=1e-6)
    assert result.metrics["clip_fraction"].item() == pytest.approx(2 / 5)
    assert result.metrics["policy_ratio"].item() == pytest.approx(1.0)
    k3 = [r - 1 - math.log(r) for r in ratio.tolist()]
    assert result.metrics["policy_kl"].item() == pytest.approx(sum(k3) / 5, abs=1e-6)


def test_clipped_tokens_have_no_gradient_and_others_that_of_the_ratio():
    logprobs = torch.tensor([1.0, 1.5]).log().requires_grad_()
    clipped_policy_loss(logprobs, torch.zeros(2), torch.ones(2), clip_low=0.2, clip_high=0.2, tokens=2).loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_parts_of_a_batch_add_up_to_the_whole():
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 10)
    options = {"clip_low": 0.2, "clip_high": 0.2, "tokens": 10}
    whole = clipped_policy_loss(new, old, advantages, **options).loss
    parts = [clipped_policy_loss(new[s], old[s], advantages[s], **options).loss for s in (slice(0, 3), slice(3, 10))]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


def test_k3_is_zero_for_equal_policies_and_positive_otherwise():
    equal = torch.tensor([-1.0, -2.0])
    assert k3_divergence(equal, equal, tokens=2).item() == 0.0
    # d = log 2 and log 1/2: (2 - log 2 - 1 + 0.5 + log 2 - 1) / 2
    other = equal + torch.tensor([math.log(2), -math.log(2)])
    assert k3_divergence(equal, other, tokens=2).item() == pytest.approx(0.25, abs=1e-6)
