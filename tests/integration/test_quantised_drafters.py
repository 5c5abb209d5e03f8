"""A drafter with weights in a format: an engine accepts as much as `drafters formats` predicts."""

import pytest
import torch
from engines import MODELS, in_process_llm
from marks import again
from test_drafters_trained import sampled
from transformers import AutoModelForCausalLM

from drafters.exploration.acceptance import quantised
from drafters.exploration.candidates import NAMED
from drafters.learners.factory import load_learner
from drafters.registry import DrafterConfig
from drafters.training.expected_acceptance import predicted_acceptance


@pytest.mark.parametrize(
    ("kind", "draft_sampling"), [("eagle3", "greedy"), again("eagle3", "probabilistic"), again("draft_model", "greedy")]
)
def test_the_predicted_acceptance_length_of_mx4_is_the_measured_one(kind, draft_sampling, tmp_path):
    """The engine serves the values of MX4, written as a checkpoint in bfloat16, which holds them exactly."""
    policy = AutoModelForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval()
    learner = quantised(load_learner(kind, MODELS / kind, policy), NAMED["MX4"], ["lm_head"])
    learner.write(tmp_path, MODELS / "policy")
    drafter = DrafterConfig(kind=kind, model=str(tmp_path), draft_sampling=draft_sampling)
    with in_process_llm(MODELS / "policy", drafter, per_request_spec_decode_metrics="summary") as llm:
        samples, measured = sampled(llm, count=384)
    predicted = predicted_acceptance(learner, policy, samples, 3, draft_sampling=draft_sampling)
    print(f"{kind} in MX4, {draft_sampling}: predicted {1 + sum(predicted):.3f}, measured {measured.length:.3f} over "
          f"{measured.steps} steps")  # fmt: skip
    assert 1 + sum(predicted) == pytest.approx(measured.length, rel=0.01)
    as_it_was = predicted_acceptance(
        load_learner(kind, MODELS / kind, policy), policy, samples, 3, draft_sampling=draft_sampling
    )
    assert sum(predicted) < sum(as_it_was), "the prediction is that of the quantised drafter"
