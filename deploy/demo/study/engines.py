"""Engines of the study in this process, configured as the service's, and the measurement of a drafter on one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# vLLM reads these when it is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "rollout_service", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from config import StudyConfig

from drafters.acceptance import Acceptance, length_interval, total
from drafters.registry import DrafterConfig
from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import bare_llm


@contextmanager
def engine(config: StudyConfig, model: str, drafter: DrafterConfig, streams: int) -> Iterator[Any]:
    """A vLLM `LLM` of `model` with `drafter`."""
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = config.engine.model_copy(update={"max_num_seqs": streams, "seed": config.seed})
    llm = bare_llm(ServiceConfig(model=model, engine=settings, drafter=drafter))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def generate(llm: Any, prompts: list[str], **sampling: Any) -> tuple[list[Any], float]:
    """Generates a completion of each prompt, with its own seed. Returns vLLM's outputs and the seconds."""
    from vllm import SamplingParams

    began = time.perf_counter()
    params = [SamplingParams(temperature=1.0, seed=i, **sampling) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return outputs, time.perf_counter() - began


def measured(outputs: list[Any], seconds: float) -> dict[str, Any]:
    """Acceptance length with its 95 % interval, acceptance by position, and tokens per second."""
    metrics = [o.outputs[0].spec_decode_metrics for o in outputs]
    parts = [Acceptance(m.num_draft_tokens, m.histogram) for m in metrics if m is not None]
    whole, tokens = total(parts), sum(len(o.outputs[0].token_ids) for o in outputs)
    low, high = length_interval(parts)
    return {
        "acceptance_length": whole.length,
        "acceptance_length_ci": [low, high] if parts else None,
        "acceptance_by_position": whole.by_position,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
