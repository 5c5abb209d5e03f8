"""Trained drafters: vLLM loads what `drafters train` writes, and accepts as much as the forward pass predicts."""

import json

import pytest
import reasoning_gym
import torch
from engines import MODELS, in_process_llm
from marks import again
from transformers import AutoModelForCausalLM

from drafters.acceptance import Acceptance, total
from drafters.files.text_lines import json_lines
from drafters.learners.factory import load_learner
from drafters.registry import DrafterConfig
from drafters.training.command import train_drafter
from drafters.training.config import TrainDrafterConfig
from drafters.training.expected_acceptance import predicted_acceptance
from drafters.training.samples import Sample

DEMO = {
    "draft_model": DrafterConfig(kind="draft_model", model=str(MODELS / "draft_model")),
    "eagle3": DrafterConfig(kind="eagle3", model=str(MODELS / "eagle3")),
    "mtp": DrafterConfig(kind="mtp"),
}

SHAPES = {
    "draft_model": {"hidden_size": 96},
    "eagle3": {"policy_layers": [2, 4, 6], "vocabulary_size": 40},
    "mtp": {},
}
LEARNT = {"draft_model": 1.1, "eagle3": 1.4, "mtp": 1.4}
"""least acceptance length after 40 steps; a random drafter has at most 1.03"""


def sampled(llm, temperature=1.0, count=192, max_tokens=160):
    """Samples of the policy, and the acceptance of their drafts."""
    from engines import ROOT
    from vllm import SamplingParams

    prompts = list(json_lines(ROOT / "deploy/demo/prompts.jsonl", lambda line: line["prompt"]))
    params = [SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i) for i in range(count)]
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    outputs = llm.generate(chosen, params, use_tqdm=False)
    samples = [Sample(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]
    metrics = [o.outputs[0].spec_decode_metrics for o in outputs]
    return samples, total(Acceptance(m.num_draft_tokens, m.histogram) for m in metrics)


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        again("draft_model", 1.0),
        ("eagle3", 0.7),
        again("mtp", 1.0),
    ],
)
def test_the_predicted_acceptance_length_is_the_measured_one(kind, temperature):
    with in_process_llm(MODELS / "policy", DEMO[kind], per_request_spec_decode_metrics="summary") as llm:
        samples, measured = sampled(llm, temperature)
    policy = AutoModelForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval()
    folder = MODELS / ("policy" if kind == "mtp" else kind)
    learner = load_learner(kind, folder, policy)
    predicted = predicted_acceptance(learner, policy, samples, 3, temperature=temperature)
    print(f"{kind} T={temperature}: predicted {1 + sum(predicted):.3f} {predicted}, measured {measured.length:.3f} "
          f"{measured.by_position} over {measured.steps} steps")  # fmt: skip
    assert 1 + sum(predicted) == pytest.approx(measured.length, rel=0.03)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The policy's completions of many problems, as JSON lines in the service's form. From few problems a drafter would
    learn the answers by heart, and then be accepted less on others."""
    from vllm import SamplingParams

    file = tmp_path_factory.mktemp("rollouts") / "groups.jsonl"
    params = SamplingParams(temperature=1.0, max_tokens=160, seed=0)
    size = {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2}
    problems = reasoning_gym.create_dataset("chain_sum", seed=10_000_000, size=1024, **size)
    prompts = [problem["question"] + "\n" for problem in problems]
    with in_process_llm(MODELS / "policy", DrafterConfig()) as llm, file.open("w") as lines:
        for output in llm.generate(prompts, params, use_tqdm=False):
            completions = [{"token_ids": list(completion.token_ids)} for completion in output.outputs]
            entry = {"prompt_token_ids": list(output.prompt_token_ids), "completions": completions}
            lines.write(json.dumps(entry) + "\n")
    return file


@pytest.mark.parametrize("kind", ["eagle3", again("draft_model"), "mtp"])
def test_a_drafter_trained_from_scratch_is_loaded_and_accepted(kind, rollouts, tmp_path):
    by_position = train_drafter(TrainDrafterConfig.model_validate({
        "kind": kind, "policy": str(MODELS / "policy"), "data": rollouts, "out": tmp_path / "out", "device": "cpu",
        "head": SHAPES[kind],
        "training": {"steps": 40, "warmup": 10, "validate_every": 40},
    }))  # fmt: skip
    policy_folder = tmp_path / "out" if kind == "mtp" else MODELS / "policy"
    drafter = DrafterConfig(kind=kind, model=None if kind == "mtp" else str(tmp_path / "out"))
    with in_process_llm(policy_folder, drafter, per_request_spec_decode_metrics="summary") as llm:
        _, measured = sampled(llm, count=128)
    print(f"{kind}: predicted {1 + sum(by_position):.3f}, measured {measured.length:.3f}")
    assert measured.length > LEARNT[kind]
    assert measured.length == pytest.approx(1 + sum(by_position), rel=0.05), "other problems, the same drafter"
