"""Each patch: its self-test fails without it on this platform and passes with it; nothing that is right is replaced."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from engines import MODELS

from rollout_service.vllm_plugin import patches


@pytest.fixture(autouse=True)
def registered():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the patches are for the CPU")
    patches.apply_patches()


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.name.rsplit(".", 1)[-1])
def test_the_self_test_passes_once_patched(patch):
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

    from rollout_service.vllm_plugin.logprobs_without_text import leave_flat_logprobs_undecoded

    leave_flat_logprobs_undecoded()
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


def test_in_a_fresh_process_the_stock_functions_fail_and_are_replaced_once():
    code = """
import os; os.environ["VLLM_PLUGINS"] = ""
from rollout_service.vllm_plugin import patches
failing = [p.name for p in patches.PATCHES if not patches._passes(p.is_right)]
assert patches.apply_patches() == failing, failing
assert patches.apply_patches() == []
print("failing:", len(failing))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"failing: {len(patches.APPLIED)}")


def test_a_function_that_is_right_is_left_alone(monkeypatch):
    replaced = []
    right = patches.Patch("right", "nothing", lambda: True, lambda: replaced.append("right"))
    monkeypatch.setattr(patches, "PATCHES", [right])
    assert patches.apply_patches() == []
    assert replaced == []


def test_a_function_that_stays_wrong_refuses_to_serve(monkeypatch):
    wrong = patches.Patch("wrong", "always", lambda: False, lambda: None)
    monkeypatch.setattr(patches, "PATCHES", [wrong])
    with pytest.raises(RuntimeError, match="refusing to serve"):
        patches.apply_patches()


def test_the_plugin_is_registered_with_vllm():
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "rollout_service"]
    assert entry.load() is importlib.import_module("rollout_service.vllm_plugin").register
