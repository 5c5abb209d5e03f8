"""The engine samples from the policy's distribution, whatever drafts; the stock CPU function shows we can tell."""

import pytest
from engines import MODELS, in_process_llm

from drafters.drafter import DrafterConfig
from rollout_service.evaluation.config import CompareConfig
from rollout_service.evaluation.losslessness import Recomputation
from rollout_service.protocol import Completion, Group
from rollout_service.vllm_plugin import patches

KINDS = {
    "none": DrafterConfig(),
    "ngram": DrafterConfig(kind="ngram"),
    "draft_model": DrafterConfig(kind="draft_model", model=str(MODELS / "draft_model")),
    "eagle3": DrafterConfig(kind="eagle3", model=str(MODELS / "eagle3")),
    "mtp": DrafterConfig(kind="mtp"),
}
PROMPTS = [f"State the final answer to the following arithmetic problem: {a} + {a + 7} - 31 =\n" for a in range(20, 84)]


def sample(llm, temperature):
    """3,072 tokens as groups, drawn with fixed seeds."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=48, ignore_eos=True, seed=i, logprobs=0, flat_logprobs=True)
        for i in range(len(PROMPTS))
    ]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [
        Group(
            id="", engine=0, prompt_token_ids=list(o.prompt_token_ids),
            completions=[Completion(index=0, text="", token_ids=list(o.outputs[0].token_ids), finish_reason="length",
                                    logprobs=o.outputs[0].logprobs.logprobs, weight_versions=[])],
        )
        for o in outputs
    ]  # fmt: skip


def z_score(groups, temperature, tmp_path):
    (tmp_path / "p.jsonl").touch()
    config = CompareConfig(model="demo", prompts=tmp_path / "p.jsonl", temperature=temperature)
    return Recomputation(MODELS / "policy", config).sums(groups).z


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_policy_with_every_drafter(kind, tmp_path):
    with in_process_llm(MODELS / "policy", KINDS[kind]) as llm:
        for temperature in (1.0, 0.7):
            assert abs(z_score(sample(llm, temperature), temperature, tmp_path)) < 4
        if kind in ("draft_model", "eagle3", "mtp"):
            llm.collective_rpc("set_draft_sampling", args=("greedy",))
            assert abs(z_score(sample(llm, 1.0), 1.0, tmp_path)) < 4


def test_the_stock_cpu_function_is_caught(tmp_path, monkeypatch):
    """Without the patch the same engine draws from something else, by far more than chance."""
    from vllm.v1.sample import rejection_sampler

    if "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens" not in patches.APPLIED:
        pytest.skip("vLLM's own function is right on this platform")
    with in_process_llm(MODELS / "policy", KINDS["mtp"]) as llm:
        monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", patches.STOCK["expand_batch_to_tokens"])
        groups = sample(llm, 0.7)
    assert not patches.expand_is_right()
    assert abs(z_score(groups, 0.7, tmp_path)) > 10
