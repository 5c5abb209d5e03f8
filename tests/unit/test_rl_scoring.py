"""Scores of tokens under the sampling distribution, and the losslessness z over them."""

import math

import pytest
import torch

from drafters.scoring import SurprisalSums, kept_tokens, score_tokens

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.15, 0.1]])


def test_entropy_and_variance_of_surprisal_by_hand():
    scores = score_tokens(PROBABILITIES.log(), torch.tensor([1]))
    surprisal = [-math.log(p) for p in PROBABILITIES[0].tolist()]
    entropy = sum(p * s for p, s in zip(PROBABILITIES[0].tolist(), surprisal, strict=True))
    variance = sum(p * (s - entropy) ** 2 for p, s in zip(PROBABILITIES[0].tolist(), surprisal, strict=True))
    assert scores.logprobs.item() == pytest.approx(math.log(0.25), abs=1e-6)
    assert scores.entropy.item() == pytest.approx(entropy, abs=1e-6)
    assert scores.variance.item() == pytest.approx(variance, abs=1e-6)


def test_temperature_divides_the_logits():
    scores = score_tokens(PROBABILITIES.log(), torch.tensor([0]), temperature=0.5)
    squares = PROBABILITIES.square()
    assert scores.logprobs.item() == pytest.approx(math.log(squares[0, 0] / squares.sum()), abs=1e-6)


def test_top_k_then_top_p_renormalise_what_they_leave():
    assert kept_tokens(PROBABILITIES.log(), top_p=1.0, top_k=2).tolist() == [[True, True, False, False]]
    assert kept_tokens(PROBABILITIES.log(), top_p=0.7, top_k=0).tolist() == [[True, True, False, False]]
    # top-k leaves three, renormalised to 0.56, 0.28 and 0.17; top-p 0.5 leaves one of these
    assert kept_tokens(PROBABILITIES.log(), top_p=0.5, top_k=3).tolist() == [[True, False, False, False]]
    scores = score_tokens(PROBABILITIES.log(), torch.tensor([1]), top_k=2)
    assert scores.sampled_logprobs.item() == pytest.approx(math.log(1 / 3), abs=1e-6)
    assert scores.logprobs.item() == pytest.approx(math.log(1 / 4), abs=1e-6), "training uses no cut"


@pytest.mark.parametrize(
    ("device", "kept"), [("cpu", [True, True, True, True, False]), ("cuda", [True, True, True, False, False])]
)
def test_a_tie_for_the_last_of_the_top_k_is_cut_as_the_device_cuts_it(device, kept):
    """A CPU keeps all that tie, a GPU the first ones that make up k."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    assert kept_tokens(logits, top_p=1.0, top_k=3, device=device)[0].tolist() == kept
    # top-p counts the mass of what top-k has left
    cut = kept_tokens(logits, top_p=0.85, top_k=3, device=device)[0]
    assert cut.sum() == (3 if device == "cpu" else 2)
    assert kept_tokens(logits, top_p=1.0, top_k=9, device=device).all()
    assert kept_tokens(logits, top_p=1.0, top_k=0, device=device).all()


def test_a_token_outside_the_recomputed_cut_stays_finite():
    scores = score_tokens(PROBABILITIES.log(), torch.tensor([3]), top_k=2)
    assert scores.sampled_logprobs.item() == pytest.approx(math.log(0.1 / 0.85), abs=1e-6)


@pytest.mark.parametrize("cut", [{}, {"top_k": 8}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.9}])
def test_z_of_a_correct_sampler_is_a_standard_normal_and_of_a_wrong_temperature_is_large(cut):
    torch.manual_seed(0)
    logits = 2.0 * torch.randn(20_000, 24)
    kept = kept_tokens(logits, top_p=cut.get("top_p", 1.0), top_k=cut.get("top_k", 0))
    for temperature, expected in ((1.0, True), (1.1, False)):
        drawn = torch.multinomial((logits / temperature).masked_fill(~kept, -math.inf).softmax(1), 1).squeeze(1)
        sums = SurprisalSums.of(score_tokens(logits, drawn, **cut))
        assert (abs(sums.z) < 4.0) is expected
        assert sums.tokens == 20_000


def test_sums_add_up_to_the_z_of_all_tokens():
    logits, tokens = torch.randn(100, 8), torch.randint(8, (100,))
    first = SurprisalSums.of(score_tokens(logits[:30], tokens[:30]))
    second = SurprisalSums.of(score_tokens(logits[30:], tokens[30:]))
    assert (first + second).z == pytest.approx(SurprisalSums.of(score_tokens(logits, tokens)).z, abs=1e-5)
    assert SurprisalSums().z == 0.0
