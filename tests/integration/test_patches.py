"""Each patch is needed: its self-test or an engine shows the fault without it. Correct functions stay unchanged."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from engines import MODELS, in_process_llm

from drafters.registry import DrafterConfig
from rollout_service.vllm_plugin import table


@pytest.fixture(autouse=True)
def registered():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the patches are for the CPU")
    table.apply_patches()


TESTED = [patch for patch in table.PATCHES if patch.is_right is not None]


@pytest.mark.parametrize("patch", TESTED, ids=lambda patch: patch.name.rsplit(".", 1)[-1])
def test_the_self_test_passes_once_patched(patch):
    patch.ensure()  # those that are not applied when the plugin is loaded
    assert patch.is_right()


def test_ranks_are_those_of_the_function_that_is_replaced():
    import torch
    from vllm.v1.sample.ops import logprobs

    from rollout_service.vllm_plugin.patches.ranks import batched_count_greater_than

    draws = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    draws[1, ::3] = -torch.inf
    values = draws.gather(1, torch.tensor([[0], [1], [3], [2999], [7]]))
    stock = logprobs.batched_count_greater_than._torchdynamo_orig_callable
    assert torch.equal(batched_count_greater_than(draws, values), stock(draws, values))
    assert torch.equal(batched_count_greater_than(draws[:0], values[:0]), torch.zeros(0, dtype=torch.int64))


def test_only_log_probabilities_that_are_flat_are_left_without_the_tokens_texts():
    import numpy as np
    from vllm.sampling_params import SamplingParams
    from vllm.tokenizers import get_tokenizer
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    tokenizer = get_tokenizer(str(MODELS / "policy"))
    token, logprob, rank = np.array([[40]], dtype=np.int32), np.array([[-0.5]], dtype=np.float32), np.array([1])
    found = {}
    for flat in True, False:
        request = SimpleNamespace(sampling_params=SamplingParams(logprobs=0, flat_logprobs=flat))
        processor = LogprobsProcessor.from_new_request(tokenizer, request)
        processor._update_sample_logprobs(LogprobsLists(token, logprob, rank))
        found[flat] = processor.logprobs[0][40]
    assert (found[True].logprob, found[True].decoded_token) == (-0.5, None)
    assert (found[False].logprob, found[False].decoded_token) == (-0.5, tokenizer.decode([40]))


def in_a_fresh_process(code):
    """Run code without the plugin, and return what it prints."""
    environment = os.environ | {"VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_patch_has_become_unneeded():
    """A name in this list means that vLLM has fixed the function: its patch can go."""
    code = "from rollout_service.vllm_plugin.table import unneeded; print('unneeded:', unneeded())"
    assert in_a_fresh_process(code).splitlines()[-1] == "unneeded: []"


def test_in_a_fresh_process_each_defect_is_replaced_once():
    code = """
from rollout_service.vllm_plugin.table import DEFECTS, apply_patches
assert apply_patches() == [p.name for p in DEFECTS]
assert apply_patches() == []
print("replaced once")
"""
    assert in_a_fresh_process(code).splitlines()[-1] == "replaced once"


def test_the_command_lists_every_patch():
    code = """
import sys
from rollout_service.cli import main
sys.argv = ["rollout-service", "patches"]
main()
"""
    said = in_a_fresh_process(code)
    assert [name for p in table.PATCHES for name in (p.name, p.file, p.unneeded) if name not in said] == []
    assert said.count("fails without it here") == len(TESTED)


def test_steps_without_drafts_are_recorded_by_the_patch_alone(monkeypatch):
    """The steps of a response add up to its tokens."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    def unattributed(llm):
        params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=1)
        (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0].outputs
        metrics = output.spec_decode_metrics
        assert sum(metrics.per_step_drafted) > 0
        return len(output.token_ids) - sum(accepted + 1 for accepted in metrics.per_step_accepted)

    drafter = DrafterConfig(kind="ngram", draft_sampling="greedy", prompt_lookup_min=1)
    with in_process_llm(MODELS / "policy", drafter, per_request_spec_decode_metrics="detailed") as llm:
        assert unattributed(llm) == 0
        monkeypatch.setattr(Scheduler, "update_from_output", Scheduler.update_from_output.__wrapped__)
        assert unattributed(llm) > 0


def test_the_plugin_is_registered_with_vllm():
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "rollout_service"]
    assert entry.load() is importlib.import_module("rollout_service.vllm_plugin").register
