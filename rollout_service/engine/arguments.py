"""Arguments that the service gives vLLM, for an engine and for a request."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafters.registry import make_drafter
from drafters.schedule import Range, to_drafts
from rollout_service.config import ServiceConfig
from rollout_service.engine.graph_sizes import capture_sizes
from rollout_service.engine.hardware import resolve_device, runner_of
from rollout_service.engine.recurrent_layers import check_drafts_are_taken_back
from rollout_service.protocol import GroupRequest, Sampling

if TYPE_CHECKING:
    from vllm import LLM, AsyncEngineArgs, SamplingParams
    from vllm.config import VllmConfig

CPU_KV_CACHE_GIB = 1.0
GRAPH_ARGUMENTS = {"compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size"}
"""arguments of vLLM by which a user chooses the sizes of CUDA graphs"""


def engine_arguments(
    config: ServiceConfig, folder: str, device: str, index: int = 0, draft_lengths: list[Range] | None = None
) -> "AsyncEngineArgs":
    """vLLM's arguments of engine `index` for the policy in `folder`. `draft_lengths` are those of a schedule that can
    change, or None for one that cannot."""
    from vllm import AsyncEngineArgs

    engine = config.engine
    cpu = device == "cpu"
    gib = engine.kv_cache_gib or (CPU_KV_CACHE_GIB if cpu else None)
    platform: dict[str, Any] = (
        {"enforce_eager": True, "distributed_executor_backend": "uni" if engine.tensor_parallel_size == 1 else "mp"}
        if cpu
        else {
            "enforce_eager": bool(engine.enforce_eager),
            "gpu_memory_utilization": engine.gpu_memory_utilization,
        }
    )
    more = platform | engine.vllm
    if config.openai.reasoning_parser is not None:  # so that grammars begin where the reasoning ends
        from vllm.config import StructuredOutputsConfig

        grammars = {"reasoning_parser": config.openai.reasoning_parser, **more.get("structured_outputs_config", {})}
        more["structured_outputs_config"] = StructuredOutputsConfig(**grammars)
    if engine.routed_experts:
        more["enable_return_routed_experts"] = True
    speculative = speculative_config(config, device, draft_lengths)
    if speculative and draft_lengths is not None and not cpu and not GRAPH_ARGUMENTS & more.keys():
        more["cudagraph_capture_sizes"] = capture_sizes(
            engine.max_num_seqs, set(to_drafts(draft_lengths, engine.max_num_seqs))
        )
    return AsyncEngineArgs(
        model=folder,
        served_model_name=[config.served_name],
        dtype=engine.dtype,
        seed=engine.seed + index,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        tensor_parallel_size=engine.tensor_parallel_size,
        kv_cache_memory_bytes=int(gib * 2**30) if gib else None,
        speculative_config=speculative,
        per_request_spec_decode_metrics="detailed" if speculative else "none",
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
        generation_config="vllm",  # a checkpoint's own sampling defaults must not change what is asked for
        worker_extension_cls="rollout_service.vllm_plugin.worker.WorkerExtension",
        **more,
    )


def speculative_config(
    config: ServiceConfig, device: str, draft_lengths: list[Range] | None = None
) -> dict[str, Any] | None:
    """vLLM's `speculative_config` of an engine on `device`; None without a drafter."""
    drafter, runner = make_drafter(config.drafter), runner_of(device)
    speculative = drafter.speculative_config()
    if speculative is None:
        return None
    if (method := drafter.on[runner].method) is not None:
        speculative["method"] = method
    if draft_lengths is not None:
        speculative["num_speculative_tokens_per_batch_size"] = draft_lengths
    if runner == "v2" and config.drafter.verification == "block":
        speculative["rejection_sample_method"] = "block"
    return speculative


def check_arguments(config: ServiceConfig, device: str) -> None:
    """Raises ValueError for an argument of `engine.vllm` that vLLM takes on this device, and then dies of."""
    if device == "cpu" and config.engine.vllm.get("enable_expert_parallel"):
        raise ValueError(
            "engine.vllm.enable_expert_parallel: vLLM's CPU kernel takes every expert for its own, and reads past the "
            "weights of a rank that has some of them; leave it out: engine.tensor_parallel_size divides each expert"
        )


def check_runner(vllm_config: "VllmConfig", device: str) -> None:
    """Raises ValueError when vLLM does not choose the model runner that the service was written for on this device."""
    chosen, needed = "v2" if vllm_config.use_v2_model_runner else "v1", runner_of(device)
    if chosen != needed:
        raise ValueError(
            f"engine.device: on {device} the service needs vLLM's {needed.upper()} model runner, and vLLM chose "
            f"{chosen.upper()}; unset VLLM_USE_V2_MODEL_RUNNER, and leave out what {needed.upper()} does not support "
            "(vLLM's log names it)"
        )


@contextlib.contextmanager
def names_engine_arguments(config: ServiceConfig) -> Iterator[None]:
    """A context in which vLLM takes its arguments: an error names those of `engine.vllm`, if there are any. vLLM's core
    process judges some of them, and raises RuntimeError."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if not config.engine.vllm:
            raise
        names = ", ".join(f"engine.vllm.{name}" for name in config.engine.vllm)
        raise ValueError(f"{names}: vLLM does not start with this: {error}") from error


def bare_llm(config: ServiceConfig) -> "LLM":
    """vLLM's `LLM` with the configuration of the service's engine but without the service, for measurements.
    `config.model` is a folder, and draft lengths are fixed. Raises ValueError when the drafter cannot draft for it."""
    device = resolve_device(config.engine.device)
    check_drafts_are_taken_back(config.drafter, Path(config.model), device)
    from vllm import LLM, EngineArgs

    arguments = engine_arguments(config, config.model, device)
    # The arguments of the asynchronous engine have some fields more.
    return LLM(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(EngineArgs)})


def sampling_params(group: GroupRequest) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    s: Sampling = group.sampling
    return SamplingParams(
        n=group.n,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        stop=s.stop or None,
        ignore_eos=s.ignore_eos,
        seed=s.seed,
        logprobs=0,  # only of the sampled token
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
