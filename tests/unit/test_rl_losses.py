"""Every loss, average and the k3 divergence, against values worked out by hand."""

import math
import re

import pytest
import torch

from rl_loop.custom_function import CustomFunctionError
from rl_loop.losses.cispo import CISPO
from rl_loop.losses.custom_loss import CustomLoss
from rl_loop.losses.dapo import DAPO
from rl_loop.losses.dr_grpo import DrGRPO
from rl_loop.losses.grpo import GRPO
from rl_loop.losses.gspo import GSPO
from rl_loop.losses.kl import k3_divergence
from rl_loop.losses.policy_loss import Totals, policy_loss
from rl_loop.losses.registry import LOSSES
from rl_loop.losses.terms import LossInput, LossTerms

RATIOS = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
ADVANTAGES = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0])


CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def loss_input(ratios, advantages, lengths=None):
    logprobs = ratios.log().requires_grad_()
    return LossInput(logprobs, torch.zeros_like(logprobs), advantages, lengths or [1] * len(ratios))


def test_grpo_is_the_token_mean_of_the_pessimistic_term():
    result = policy_loss(GRPO(**CLIP), loss_input(RATIOS, ADVANTAGES), Totals(5, 5, 10))
    # min(ratio A, clipped A): 2, 1.3 (clipped above), 0.5, -1.5, -0.8 (clipped below)
    assert result.loss.item() == pytest.approx(-(2.0 + 1.3 + 0.5 - 1.5 - 0.8) / 5, abs=1e-6)
    assert result.metrics["clip_fraction"].item() == pytest.approx(2 / 5)
    assert result.metrics["policy_ratio"].item() == pytest.approx(1.0)
    k3 = [r - 1 - math.log(r) for r in RATIOS.tolist()]
    assert result.metrics["policy_kl"].item() == pytest.approx(sum(k3) / 5, abs=1e-6)


def test_clipped_tokens_have_no_gradient_and_others_that_of_the_ratio():
    batch = loss_input(torch.tensor([1.0, 1.5]), torch.ones(2))
    policy_loss(GRPO(**CLIP), batch, Totals(2, 2, 10)).loss.backward()
    assert batch.logprobs_N.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_dr_grpo_sums_a_response_and_divides_by_the_constant_length():
    # Rows of 1 and 4 tokens, max_tokens 10: the sum of all terms over 2 x 10
    batch = loss_input(RATIOS, ADVANTAGES, lengths=[1, 4])
    result = policy_loss(DrGRPO(**CLIP), batch, Totals(5, 2, 10))
    assert result.loss.item() == pytest.approx(-(2.0 + 1.3 + 0.5 - 1.5 - 0.8) / 20, abs=1e-6)


def test_grpo_as_in_its_paper_is_the_mean_of_the_responses_means():
    result = policy_loss(
        GRPO(average="sequence", **CLIP), loss_input(RATIOS, ADVANTAGES, lengths=[1, 4]), Totals(5, 2, 10)
    )
    assert result.loss.item() == pytest.approx(-(2.0 + (1.3 + 0.5 - 1.5 - 0.8) / 4) / 2, abs=1e-6)


def test_dapo_clips_at_a_wider_range_above_than_below():
    batch = loss_input(torch.tensor([1.27, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0]))
    result = policy_loss(DAPO(), batch, Totals(3, 3, 10))
    # 1.27 is free, 1.5 becomes 1.28, and 0.5 with a negative advantage becomes 0.8
    assert result.loss.item() == pytest.approx(-(1.27 + 1.28 - 0.8) / 3, abs=1e-6)
    assert result.metrics["clip_fraction"].item() == pytest.approx(2 / 3)


def test_gspo_clips_the_geometric_mean_of_a_whole_response():
    # Ratios 2 and 8 in one response: geometric mean 4, clipped to 1.3; the other's 0.25 and 1 give 0.5, unclipped
    batch = loss_input(torch.tensor([2.0, 8.0, 0.25, 1.0]), torch.ones(4), lengths=[2, 2])
    result = policy_loss(GSPO(**CLIP), batch, Totals(4, 2, 10))
    assert result.loss.item() == pytest.approx(-(1.3 + 0.5) / 2, abs=1e-6)
    assert result.metrics["clip_fraction"].item() == pytest.approx(2 / 4)
    result.loss.backward()
    # d/dlogp of -s/2 with s = exp(mean): -s/2 x 1/2 for each of the two tokens of the unclipped response
    assert batch.logprobs_N.grad.tolist() == pytest.approx([0.0, 0.0, -0.125, -0.125])


def test_cispo_bounds_the_weight_and_keeps_every_tokens_gradient():
    batch = loss_input(torch.tensor([1.0, 3.0, 0.1]), torch.tensor([1.0, 1.0, -2.0]))
    result = policy_loss(CISPO(clip_high=0.5), batch, Totals(3, 3, 10))
    log3, log01 = math.log(3.0), math.log(0.1)
    assert result.loss.item() == pytest.approx(-(1.0 * 0.0 + 1.5 * log3 + 0.1 * -2.0 * log01) / 3, abs=1e-6)
    result.loss.backward()
    assert batch.logprobs_N.grad.tolist() == pytest.approx([-1 / 3, -1.5 / 3, 0.2 / 3])
    assert result.metrics["clip_fraction"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_parts_of_a_batch_add_up_to_the_whole(loss, average):
    torch.manual_seed(0)
    new, old, advantages, weights = torch.randn(4, 10)
    lengths, totals = [3, 2, 5], Totals(10, 3, 8)

    def part(tokens, rows):
        batch = LossInput(new[tokens], old[tokens], advantages[tokens], lengths[rows])
        return policy_loss(loss(average=average), batch, totals, weights[tokens]).loss.item()

    whole = part(slice(0, 10), slice(0, 3))
    assert part(slice(0, 3), slice(0, 1)) + part(slice(3, 10), slice(1, 3)) == pytest.approx(whole, abs=1e-5)


def test_weights_scale_their_tokens_terms():
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    result = policy_loss(GRPO(**CLIP), loss_input(RATIOS, ADVANTAGES), Totals(5, 5, 10), weights)
    assert result.loss.item() == pytest.approx(-(2.0 + 2 * 0.5 - 1.5) / 5, abs=1e-6)


def reinforce(batch: LossInput, scale: float) -> LossTerms:
    """A custom loss."""
    terms_N = -scale * batch.advantages_N * batch.logprobs_N
    return LossTerms(terms_N, torch.zeros_like(terms_N, dtype=torch.bool))


def test_a_custom_loss_is_a_function_with_its_options():
    own = CustomLoss(kind=f"{__name__}:reinforce", options={"scale": 2.0}, average="sequence")
    result = policy_loss(own, loss_input(RATIOS, ADVANTAGES, lengths=[2, 3]), Totals(5, 2, 10))
    log_half, log_more = math.log(0.5), math.log(1.5)
    assert result.loss.item() == pytest.approx(-2.0 * (log_more / 2 + (log_half - log_more - log_half) / 3) / 2)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("no_such_module:f", {}, "loss.kind: no_such_module:f: No module named 'no_such_module'"),
        (f"{__name__}:f", {}, f"loss.kind: {__name__}:f: module '{__name__}' has no attribute 'f'"),
        (f"{__name__}:reinforce", {}, "must take a batch and loss.options: missing a required argument: 'scale'"),
    ],
)
def test_a_custom_loss_that_cannot_be_called_is_named(kind, options, said):
    with pytest.raises(CustomFunctionError, match=re.escape(said)):
        _ = CustomLoss(kind=kind, options=options).function


def test_k3_is_zero_for_equal_policies_and_positive_otherwise():
    equal = torch.tensor([-1.0, -2.0])
    assert k3_divergence(equal, equal, tokens=2).item() == 0.0
    # d = log 2 and log 1/2: (2 - log 2 - 1 + 0.5 + log 2 - 1) / 2
    other = equal + torch.tensor([math.log(2), -math.log(2)])
    assert k3_divergence(equal, other, tokens=2).item() == pytest.approx(0.25, abs=1e-6)
