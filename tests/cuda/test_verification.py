"""Verification on a GPU: the V2 runner's kernels follow the law of drafters.verification, exactly and in samples.

Each test runs vLLM's `RejectionSampler` as the runner makes it, with cuts, log-probabilities and refused drafts.
"""

import numpy as np
import pytest
import torch
from interpreted import Step, on_the_cpu
from resolved import DRAFT_TOKENS
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.goodness_of_fit import Fit, g_test

CUTS = [Cut(temperature=1.0), Cut(temperature=0.0), Cut(temperature=0.7, top_p=0.9), Cut(temperature=1.3, top_k=4)]
REQUESTS, VOCABULARY = 96, 11
MODES = [(verification, sampled) for verification in ("standard", "block") for sampled in (True, False)]
UNLIKELY, IMPOSSIBLE = 1e-4, 1e-9
"""p-values: a right verifier is above the first, a wrong one below the second"""


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    on_the_cpu(monkeypatch)


def various(*, sampled: bool, refused: bool = False) -> Step:
    """Requests with different draft lengths, cuts and distributions. Every seventh draft is `refused`."""
    random = torch.Generator().manual_seed(7)
    lengths_R = torch.arange(REQUESTS) % (DRAFT_TOKENS + 1)
    cuts = [CUTS[i // (DRAFT_TOKENS + 1) % len(CUTS)] for i in range(REQUESTS)]
    rows, drafts = int(lengths_R.sum()) + REQUESTS, int(lengths_R.sum())
    draft_logits_RKV = torch.randn(REQUESTS, DRAFT_TOKENS, VOCABULARY, generator=random)
    step = Step(
        lengths_R,
        cuts,
        torch.randn(rows, VOCABULARY, generator=random) * 1.5,
        torch.zeros(drafts, dtype=torch.int64),
        draft_logits_RKV if sampled else None,
        torch.arange(drafts) % 7 == 3 if refused else None,
    )
    # Drafts near the policy's own tokens, so that some of each length are accepted.
    near_LV = step.logits_LV + torch.randn(rows, VOCABULARY, generator=random)
    before_L = step.precedes_draft_L
    draft_logits_RKV[step.request_L[before_L], step.place_L[before_L]] = near_LV[before_L]
    scale_L1 = step.temperature_R.where(step.temperature_R > 0.0, 1.0)[step.request_L[before_L], None]
    probs_NV = (near_LV[before_L] / scale_L1).softmax(-1)
    step.drafts_N = torch.multinomial(probs_NV, 1, generator=random).squeeze(1) if sampled else probs_NV.argmax(1)
    return step


@pytest.mark.parametrize("refused", [False, True], ids=["", "refused"])
@pytest.mark.parametrize(("verification", "sampled"), MODES)
def test_every_token_is_the_one_that_our_law_yields_with_the_same_random_numbers(verification, sampled, refused):
    step = various(sampled=sampled, refused=refused)
    sampler, verifier = step.samplers(verification)
    tokens_RK1, yielded_R, _ = step.sampled(verifier)
    expected_RK1, expected_R = step.expected(verification, sampler.sampling_states.seeds.gpu)
    assert set(yielded_R.tolist()) == set(range(1, DRAFT_TOKENS + 2))
    assert yielded_R.tolist() == expected_R.tolist()
    assert tokens_RK1[expected_RK1 >= 0].tolist() == expected_RK1[expected_RK1 >= 0].tolist()


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "deterministic"])
def test_the_verification_of_a_running_engine_can_be_switched(sampled):
    """`use_block_verification` decides at every step. The last assertion also shows that a verifier of the other kind
    does not pass the test above."""
    step = various(sampled=sampled)
    sampler, verifier = step.samplers("standard")
    seeds_R = sampler.sampling_states.seeds.gpu
    standard_R, block_R = (step.expected(v, seeds_R)[1].tolist() for v in ("standard", "block"))
    assert step.sampled(verifier)[1].tolist() == standard_R
    verifier.use_block_verification = True
    assert step.sampled(verifier)[1].tolist() == block_R
    verifier.use_block_verification = False
    assert step.sampled(verifier)[1].tolist() == standard_R
    assert standard_R != block_R


@pytest.mark.parametrize(("verification", "sampled"), MODES)
def test_log_probabilities_are_those_of_the_distribution_that_was_sampled_from(verification, sampled):
    step = various(sampled=sampled)
    _, verifier = step.samplers(verification)
    tokens_RK1, yielded_R, logprobs_L = step.sampled(verifier)
    counts_L = (step.place_L < yielded_R[step.request_L]) & ~step.greedy_L
    tokens_L = tokens_RK1[step.request_L, step.place_L]
    expected_L = step.cut_logits_LV().log_softmax(1).gather(1, tokens_L.where(counts_L, 0)[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs_L[counts_L], expected_L[counts_L], atol=1e-5, rtol=0)


SAMPLES, FEW_TOKENS, DRAFTED = 400, 4, 2


def goodness(verification: str, *, greedy_as_sampled: bool = False) -> Fit:
    """How well pairs of tokens of SAMPLES equal requests fit the policy. The drafts are drawn by vLLM's own sampler.

    The policy's distribution at a position does not depend on the tokens before it, so the tokens of a request are
    independent draws. Where a request yields only one, the second is drawn here. `greedy_as_sampled` makes verification
    wrong: the most likely token is drafted, and is verified as if it had been drawn.
    """
    random = torch.Generator().manual_seed(11)
    policy_PV = torch.randn(DRAFTED + 1, FEW_TOKENS, generator=random) * 1.5
    drafter_PV = policy_PV[:DRAFTED] + torch.randn(DRAFTED, FEW_TOKENS, generator=random)
    cache_RKV = torch.zeros(SAMPLES, DRAFT_TOKENS, FEW_TOKENS)
    step = Step(
        torch.full((SAMPLES,), DRAFTED),
        [Cut(temperature=0.8)] * SAMPLES,
        policy_PV.repeat(SAMPLES, 1),
        torch.zeros(SAMPLES * DRAFTED, dtype=torch.int64),
        cache_RKV,
    )
    sampler, verifier = step.samplers(verification)
    drafts = []
    for i, logits_V in enumerate(drafter_PV):
        drawn_R = gumbel_sample(
            logits_V.repeat(SAMPLES, 1),
            torch.arange(SAMPLES),
            step.temperature_R,
            sampler.sampling_states.seeds.gpu,
            step.position_L[step.starts_R1[:-1]] + i,
            apply_temperature=True,
            is_drafting=True,
            logits_cache=cache_RKV,
            logits_cache_col=torch.tensor(i),
        )
        drafts.append(logits_V.argmax().expand(SAMPLES) if greedy_as_sampled else drawn_R)
    step.drafts_N = torch.stack(drafts, 1).flatten()
    tokens_RK1, yielded_R, _ = step.sampled(verifier)

    probs_PV = (policy_PV / 0.8).softmax(1)
    drawn_R = torch.multinomial(probs_PV[1], SAMPLES, replacement=True, generator=random)
    second_R = tokens_RK1[:, 1].where(yielded_R > 1, drawn_R)
    counts = torch.bincount(tokens_RK1[:, 0] * FEW_TOKENS + second_R, minlength=FEW_TOKENS**2)
    return g_test(counts.numpy(), np.outer(probs_PV[0], probs_PV[1]).flatten())


@pytest.mark.parametrize("verification", ["standard", "block"])
def test_tokens_follow_the_policy(verification):
    fit = goodness(verification)
    assert fit.freedom > 5
    assert fit.p > UNLIKELY


@pytest.mark.parametrize("verification", ["standard", "block"])
def test_the_test_notices_drafts_that_are_verified_as_if_they_had_been_drawn(verification):
    assert goodness(verification, greedy_as_sampled=True).p < IMPOSSIBLE
