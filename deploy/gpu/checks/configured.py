"""Configuration of a stage's engine: that of the service, but small enough for several engines on one GPU."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from common import DEVICE, MODELS
from vllm import LLM, EngineArgs

from drafters.registry import DrafterConfig
from drafters.schedule import Range
from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import engine_arguments

WITH_FOLDERS = ("eagle3", "draft_model")
"""kinds of drafters whose weights have their own folder"""


def service_config(
    kind: str, models: Path = MODELS, *, drafter: dict[str, Any], engine: dict[str, Any]
) -> ServiceConfig:
    """A configuration with the policy in `models` and its drafter of this kind. `drafter` and `engine` set fields."""
    own: dict[str, Any] = {
        "device": DEVICE,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "kv_cache_gib": 0.25,
    }
    if DEVICE == "cuda":
        own["gpu_memory_utilization"] = 0.2
        # Kernels compile at their first use, which makes the start some seconds shorter.
        own["vllm"] = {"kernel_config": {"enable_jit_warmup": False}}
        if "BACKEND" in os.environ:
            own["vllm"]["attention_backend"] = os.environ["BACKEND"]
    folder = str(models / kind) if kind in WITH_FOLDERS else None
    return ServiceConfig(
        model=str(models / "policy"),
        engine=own | engine,
        drafter=DrafterConfig(kind=kind, model=folder, **drafter),
    )


def draft_ranges(config: ServiceConfig, ranges: str) -> list[Range]:
    """The schedule that an engine starts with. Its CUDA graphs are captured for the draft lengths of the schedule.

    start: the schedule of the service; every: a schedule with every draft length.
    """
    longest, streams = config.drafter.draft_tokens, config.engine.max_num_seqs
    if ranges == "start":
        return [(1, streams, longest)]
    return [(j + 1, j + 1, j) for j in range(longest)] + [(longest + 1, streams, longest)]


def started(config: ServiceConfig, ranges: str = "start") -> LLM:
    lengths = None if config.drafter.kind == "none" else draft_ranges(config, ranges)
    arguments = engine_arguments(config, config.model, DEVICE, draft_lengths=lengths)
    # The arguments of the asynchronous engine have more fields.
    own = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(EngineArgs)}
    return LLM(**own | {"disable_log_stats": False})
