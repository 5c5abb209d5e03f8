"""Resolved configurations: what vLLM makes of this project's engine arguments, without starting an engine."""

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig

from drafters.registry import DrafterConfig
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.engine.arguments import engine_arguments
from rollout_service.engine.draft_lengths import DraftLengths

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "models"
WITH_FOLDERS = ("eagle3", "draft_model")
STREAMS, DRAFT_TOKENS = 32, 3


def service_config(
    kind: str, *, dtype: str = "bfloat16", drafter: dict[str, Any] | None = None, **engine: Any
) -> ServiceConfig:
    """The demo's policy on a GPU. `drafter` and `engine` set further fields."""
    own: dict[str, Any] = {"kind": kind}
    if kind != "none":
        own["draft_tokens"] = DRAFT_TOKENS
    if kind in WITH_FOLDERS:
        own["model"] = str(MODELS / kind)
    return ServiceConfig(
        model=str(MODELS / "policy"),
        engine=EngineConfig(
            **{"device": "cuda", "dtype": dtype, "max_model_len": 256, "max_num_seqs": STREAMS} | engine
        ),
        drafter=DrafterConfig(**own | (drafter or {})),
    )


def resolved(config: ServiceConfig) -> VllmConfig:
    """As an engine's actor resolves it when it starts."""
    lengths = DraftLengths(config.drafter, config.engine.max_num_seqs, "v2")
    ranges = lengths.ranges if lengths.adjustable else None
    return engine_arguments(config, config.model, "cuda", draft_lengths=ranges).create_engine_config()
