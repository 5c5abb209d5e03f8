"""Policies with recurrent layers on a CPU: served without a drafter, also when a text is longer than a block."""

import pytest
import torch
from engines import MODELS, in_process_llm
from test_weight_updates import worst_difference
from tiny_models import VOCAB, save_policy
from transformers import AutoModelForCausalLM

from drafters.registry import DrafterConfig


@pytest.fixture
def policy(tmp_path):
    save_policy("mamba", seed=0, folder=tmp_path, tokenizer=MODELS / "policy")
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_a_text_that_is_longer_than_a_block_does_not_end_the_engine(policy, tmp_path):
    from vllm import SamplingParams

    prompt = torch.randint(3, VOCAB, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    with in_process_llm(tmp_path, DrafterConfig()) as llm:
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        (answer,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == 8


@pytest.mark.again
def test_drafts_that_are_rejected_stay_in_the_state_of_mambas_layers(policy, tmp_path):
    """When this fails, vLLM takes the states back on a CPU, and such policies can have a drafter."""
    drafter = DrafterConfig(kind="ngram", draft_sampling="greedy", prompt_lookup_min=1)
    with in_process_llm(tmp_path, drafter) as llm:
        assert not worst_difference(llm, policy) < 0.1  # it may be infinite, or no number
