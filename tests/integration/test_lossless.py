"""The audit passes the engine's samples with every drafter, and catches each way in which sampling can be wrong.

Every fault is put into a running engine, and the audit sees only its answers.
"""

from contextlib import contextmanager

import pytest
import torch
from engines import MODELS, in_process_llm, kept_llm
from marks import again

from drafters import verification
from drafters.registry import DrafterConfig
from rollout_service.config import EngineConfig
from rollout_service.evaluation.audit import Contexts
from rollout_service.evaluation.audit_config import AuditConfig, Setting
from rollout_service.evaluation.audit_row import Level, judge
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation
from rollout_service.protocol import Completion, Group, Speculation
from rollout_service.vllm_plugin.patch import APPLIED
from rollout_service.vllm_plugin.table import STOCK, apply_patches

POLICY = MODELS / "policy"
LIMIT = 124
KINDS = {
    "none": DrafterConfig(),
    "ngram": DrafterConfig(kind="ngram", draft_sampling="greedy"),
    "draft_model": DrafterConfig(kind="draft_model", model=str(MODELS / "draft_model")),
    "eagle3": DrafterConfig(kind="eagle3", model=str(MODELS / "eagle3")),
    "mtp": DrafterConfig(kind="mtp"),
}


def sampled(llm, requests):
    """An engine's groups, as the service's actor makes them."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            n=r.n, temperature=r.sampling.temperature, top_p=r.sampling.top_p, top_k=r.sampling.top_k,
            max_tokens=r.sampling.max_tokens, ignore_eos=True, seed=r.sampling.seed, logprobs=0, flat_logprobs=True,
        )
        for r in requests
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": r.prompt_token_ids} for r in requests], params, use_tqdm=False)
    return [
        Group(
            id="", engine=0, prompt_token_ids=r.prompt_token_ids, sampling=r.sampling,
            completions=[completion(c) for c in output.outputs],
        )
        for r, output in zip(requests, outputs, strict=True)
    ]  # fmt: skip


def completion(output):
    metrics = output.spec_decode_metrics
    speculation = metrics and Speculation(
        drafter="", drafter_version=0, draft_steps=sum(metrics.histogram), drafted=metrics.num_draft_tokens,
        accepted=sum(metrics.per_step_accepted), accepted_histogram=metrics.histogram,
        steps=list(zip(metrics.per_step_drafted, metrics.per_step_accepted, strict=True)),
    )  # fmt: skip
    return Completion(
        index=output.index, text="", token_ids=list(output.token_ids), logprobs=output.logprobs.logprobs,
        weight_versions=[], finish_reason="length", speculation=speculation,
    )  # fmt: skip


class Auditor:
    """Audits an engine in this process, row by row."""

    def __init__(self, tokens, policy=POLICY, **more):
        config = AuditConfig(model=str(policy), engine=EngineConfig(max_model_len=LIMIT + 4), tokens=tokens, **more)
        self.recomputation = Recomputation(policy)
        self.contexts = Contexts(config, self.recomputation, LIMIT)

    def row(self, llm, drafter, cut, told=None, greedy=None):
        """The audit's verdict on `cut`. If `told` is given, the engine is asked for that cut instead."""
        llm.collective_rpc("set_draft_sampling", args=(drafter.draft_sampling,))
        llm.collective_rpc("set_verification", args=(drafter.verification,))
        make = self.contexts.greedy_requests if cut.temperature == 0.0 else self.contexts.requests
        groups = sampled(llm, make(told or cut))
        return judge(Setting(drafter, cut), groups, self.recomputation, Level(), LIMIT, greedy)

    def greedy_of(self, llm):
        groups = sampled(llm, self.contexts.greedy_requests(Cut(0.0)))
        return {tuple(g.prompt_token_ids): g.completions[0].token_ids for g in groups}


OPTIONS = {"max_num_seqs": 64, "max_model_len": LIMIT + 4}
OF_DRAFTS = {"per_request_spec_decode_metrics": "detailed"}


@contextmanager
def engine(drafter, policy=POLICY, **more):
    drafter = KINDS[drafter] if isinstance(drafter, str) else drafter
    of_drafts = OF_DRAFTS if drafter.kind != "none" else {}
    with in_process_llm(policy, drafter, **(OPTIONS | of_drafts | more)) as llm:
        yield llm


def shared_engine(kind):
    """The demo's policy and a drafter of it: three drafts a step, until the test asks for other draft lengths."""
    return kept_llm(POLICY, KINDS[kind], [(1, 64, 3)], **(OPTIONS | OF_DRAFTS))


@pytest.fixture(scope="session")
def short():
    return Auditor(tokens=5_000)


@pytest.fixture(scope="session")
def long():
    return Auditor(tokens=50_000)


@pytest.fixture(scope="session")
def familiar():
    """Prompts of the drafters' own task, so that whole drafts are accepted and bonus tokens follow."""
    return Auditor(tokens=20_000, prompts=MODELS.parent / "prompts.jsonl", response_tokens=32)


@pytest.fixture(scope="session")
def greedy(short):
    with engine("none") as llm:
        assert short.row(llm, KINDS["none"], Cut(0.7, 0.9, 20)).failures == []
        return short.greedy_of(llm)


@pytest.mark.parametrize("kind", ["ngram", again("draft_model"), again("eagle3"), "mtp"])
def test_every_drafter_passes_with_both_verifications(kind, short, greedy):
    llm = shared_engine(kind)
    for method, cut in (("standard", Cut(1.0)), ("block", Cut(1.0)), ("block", Cut(0.7, 0.9, 20))):
        drafter = KINDS[kind].model_copy(update={"verification": method})
        row = short.row(llm, drafter, cut)
        assert row.failures == []
        assert {"draft 1", "draft 2", "undrafted", "context limit"} <= row.positions.keys()
        assert sum(score.tokens for name, score in row.positions.items() if name != "context limit") == row.tokens
    assert short.row(llm, drafter, Cut(0.0), greedy=greedy).failures == []


def test_faults_of_verification_are_caught_and_placed(short, long, familiar, monkeypatch):
    def scores(row):
        return {name: abs(score.z) for name, score in row.positions.items()}

    llm = shared_engine("mtp")
    drafter = KINDS["mtp"].model_copy(update={"verification": "standard"})
    with monkeypatch.context() as fault:  # the residual is drawn from the target
        fault.setattr(verification, "residual", lambda target_NV, drafts, rows, weights: target_NV[rows])
        row = long.row(llm, drafter, Cut(1.0))
        assert "first two tokens" in row.failures
        assert max(scores(row), key=scores(row).get).startswith("draft")
        assert max(scores(row)["bonus"], scores(row)["undrafted"]) < 4
    with monkeypatch.context() as fault:  # the token after an accepted draft comes from the drafter
        fault.setattr("rollout_service.vllm_plugin.verification.verify", bonus_from_the_drafter)
        row = familiar.row(llm, drafter, Cut(1.0))
        assert "surprisal at bonus" in row.failures
        assert max(scores(row), key=scores(row).get) == "bonus"
    assert familiar.row(llm, drafter, Cut(1.0)).failures == []
    assert short.row(llm, drafter, Cut(1.0)).failures == []


VERIFY = verification.verify


def bonus_from_the_drafter(target_NV, drafts, bonus_R, uniforms_R2, method):
    """Use the last draft's distribution instead of the target's next one."""
    if drafts.probs_NV is not None:
        last = (drafts.starts_R + drafts.lengths_R - 1).clamp(min=0)
        drawn = torch.multinomial(drafts.probs_NV[last], 1).squeeze(1)
        bonus_R = torch.where(drafts.lengths_R > 0, drawn, bonus_R)
    return VERIFY(target_NV, drafts, bonus_R, uniforms_R2, method)


def test_faults_of_the_distribution_are_caught(short, monkeypatch):
    from vllm.v1.sample import rejection_sampler

    apply_patches()
    expand = "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens"
    if expand not in APPLIED:
        pytest.skip("vLLM's own function is right on this platform")
    constraints = rejection_sampler.apply_sampling_constraints
    llm = shared_engine("mtp")
    with monkeypatch.context() as fault:  # vLLM's own function, as installed on a CPU
        fault.setattr(rejection_sampler, "expand_batch_to_tokens", STOCK[expand])
        row = short.row(llm, KINDS["mtp"], Cut(0.7))
        assert {"surprisal", "log-probabilities"} <= set(row.failures)
    with monkeypatch.context() as fault:  # the temperature is applied twice where drafts are verified
        fault.setattr(
            rejection_sampler,
            "apply_sampling_constraints",
            lambda logits, cu, sampling: constraints(constraints(logits, cu, sampling), cu, sampling),
        )
        row = short.row(llm, KINDS["mtp"], Cut(0.7))
        assert {"surprisal", "log-probabilities"} <= set(row.failures)
        assert abs(row.positions["draft 1"].z) > 4 > abs(row.positions["undrafted"].z)


@pytest.mark.again
def test_a_temperature_wrong_by_2_percent_is_caught_with_50000_tokens(long):
    llm = shared_engine("mtp")
    row = long.row(llm, KINDS["mtp"], Cut(1.0), told=Cut(1.02))
    assert row.tokens >= 50_000
    assert row.detectable.temperature <= 0.02
    assert set(row.failures) - {"log-probabilities"}  # those show it too, but are not tested here


def test_greedy_decoding_that_differs_is_caught(short, greedy):
    wrong = {prompt: [*tokens[:-1], (tokens[-1] + 1) % 160] for prompt, tokens in greedy.items()}
    row = short.row(shared_engine("mtp"), KINDS["mtp"], Cut(0.0), greedy=wrong)
    assert row.failures == ["differs from greedy decoding"]
    assert row.greedy.identical == 0


def test_log_probabilities_before_temperature_are_caught(short):
    with engine("mtp", logprobs_mode="raw_logprobs") as llm:
        assert short.row(llm, KINDS["mtp"], Cut(0.7)).failures == ["log-probabilities"]
