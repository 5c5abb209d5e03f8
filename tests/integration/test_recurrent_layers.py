"""Policies with recurrent layers on a CPU: served and pushed without a drafter, with texts longer than a block."""

import pytest
import torch
from engines import MODELS, in_process_llm
from test_weight_updates import load, policy_update, worst_difference
from tiny_models import VOCAB, save_policy
from transformers import AutoModelForCausalLM

from drafters.registry import DrafterConfig

TOLERANCE = 0.02
"""nats; vLLM's kernels of Mamba on a CPU are within 0.003 of transformers here, not within 1e-5"""


@pytest.fixture
def policies(tmp_path):
    """The policy that is served, and another one."""
    for seed, name in enumerate(("old", "new")):
        save_policy("mamba", seed, tmp_path / name, MODELS / "policy")
    return [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("old", "new")]


def test_recurrent_layers_are_served_and_pushed_without_a_drafter(policies, tmp_path):
    from vllm import SamplingParams

    old, new = policies
    with in_process_llm(tmp_path / "old", DrafterConfig()) as llm:
        assert worst_difference(llm, old) < TOLERANCE
        load(llm, policy_update(tmp_path), of_drafter=False)
        assert worst_difference(llm, new) < TOLERANCE
        assert worst_difference(llm, old) > 0.1
        longer_than_a_block = torch.randint(3, VOCAB, (150,), generator=torch.Generator().manual_seed(0)).tolist()
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        (answer,) = llm.generate([{"prompt_token_ids": longer_than_a_block}], params, use_tqdm=False)
        assert len(answer.outputs[0].token_ids) == 8


@pytest.mark.again
def test_drafts_that_are_rejected_stay_in_the_state_of_mambas_layers(policies, tmp_path):
    """When this fails, vLLM takes the states back on a CPU, and such policies can have a drafter."""
    drafter = DrafterConfig(kind="ngram", draft_sampling="greedy", prompt_lookup_min=1)
    with in_process_llm(tmp_path / "old", drafter) as llm:
        assert not worst_difference(llm, policies[0]) < TOLERANCE  # it may be infinite, or no number
