"""Configurations: on a GPU vLLM takes the V2 runner, and resolves every drafter, dtype and verification as said."""

import pytest
import torch
from resolved import DRAFT_TOKENS, resolved, service_config
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.selector import get_attn_backend

from rollout_service.engine.arguments import check_runner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHODS = {"mtp": "mtp", "eagle3": "eagle3", "draft_model": "draft_model", "ngram": "ngram_gpu"}
"""vLLM's method for each kind of drafter"""


def test_the_platform_is_cuda_with_the_pretended_device():
    assert current_platform.is_cuda()
    assert current_platform.get_device_name() == "NVIDIA H100 80GB HBM3"
    assert current_platform.get_device_capability().to_int() == 90
    assert torch.cuda.device_count() == 1


def test_using_the_pretended_device_fails():
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize("verification", ["auto", "standard", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", METHODS)
def test_every_drafter_resolves_to_the_v2_runner_with_graphs_and_its_verification(kind, dtype, verification):
    config = resolved(service_config(kind, dtype=dtype, drafter={"verification": verification}))
    check_runner(config, "cuda")
    speculation = config.speculative_config
    assert config.use_v2_model_runner
    assert config.parallel_config.worker_cls == "vllm.v1.worker.gpu_worker.Worker"
    assert config.model_config.dtype == DTYPES[dtype]
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    assert config.scheduler_config.async_scheduling
    assert (speculation.method, speculation.num_speculative_tokens) == (METHODS[kind], DRAFT_TOKENS)
    assert speculation.rejection_sample_method == ("block" if verification == "block" else "standard")
    assert speculation.uses_dynamic_speculative_decoding()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_without_a_drafter_resolves_to_the_v2_runner_with_graphs(dtype):
    config = resolved(service_config("none", dtype=dtype))
    check_runner(config, "cuda")
    assert config.speculative_config is None
    assert config.scheduler_config.async_scheduling
    assert config.model_config.dtype == DTYPES[dtype]
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE


def test_enforce_eager_turns_graphs_off():
    config = resolved(service_config("mtp", enforce_eager=True))
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


def test_a_fixed_draft_length_resolves_to_one_that_cannot_change():
    config = resolved(service_config("mtp", drafter={"schedule": "fixed"}))
    assert not config.speculative_config.uses_dynamic_speculative_decoding()


@pytest.mark.parametrize("draft_sampling", ["probabilistic", "greedy"])
def test_the_draft_sampling_of_the_start_is_that_of_the_configuration(draft_sampling):
    config = resolved(service_config("mtp", drafter={"draft_sampling": draft_sampling}))
    assert config.speculative_config.draft_sample_method == draft_sampling


def test_the_v1_runner_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="needs vLLM's V2 model runner, and vLLM chose V1"):
        check_runner(resolved(service_config("mtp")), "cuda")


@pytest.mark.parametrize(("dtype", "backend"), [("bfloat16", "FLASH_ATTN"), ("float32", "TRITON_ATTN")])
def test_float32_takes_the_attention_of_triton(dtype, backend):
    config = resolved(service_config("none", dtype=dtype))
    heads = config.model_config.get_head_size()
    with set_current_vllm_config(config):
        assert get_attn_backend(heads, DTYPES[dtype], None).get_name() == backend
