"""vLLM's engine arguments that a configuration may give under `engine.vllm`."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drafters.drafter import LOSSY_OPTIONS

CHOSEN = {
    "speculative_config": "speculation is configured under [drafter]",
    "logits_processors": "custom logits processors are not applied to drafted tokens; use top_p and top_k, which are",
    "generation_config": "the service does not use a checkpoint's sampling defaults; give them in each request",
    "override_generation_config": "the service has sampling defaults of its own; give others in each request",
    "logprobs_mode": "log-probabilities are always those of the distribution that was sampled from; leave it out",
    "per_request_spec_decode_metrics": "the service records every draft step; leave it out",
    "aux_output_config": "set engine.routed_experts, which returns the experts that the policy's routers choose",
    "worker_extension_cls": "the service needs its own extension, which loads weights; leave it out",
}
"""vLLM's engine arguments that the service sets itself, and what to do instead of giving them"""
SETTINGS = {
    "model": "model", "served_model_name": "name", "dtype": "engine.dtype", "seed": "engine.seed",
    "enforce_eager": "engine.enforce_eager", "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs", "tensor_parallel_size": "engine.tensor_parallel_size",
    "kv_cache_memory_bytes": "engine.kv_cache_gib", "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "reasoning_parser": "openai.reasoning_parser", "enable_return_routed_experts": "engine.routed_experts",
}  # fmt: skip
"""vLLM's engine arguments that the service's own settings decide"""


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises ValueError for an argument that the service sets itself, that a setting of the service decides, or that
    vLLM does not have."""
    if not arguments:
        return
    known = known_arguments()
    for name, given in arguments.items():
        if name in CHOSEN:
            lossy = sorted(LOSSY_OPTIONS & set(given)) if isinstance(given, dict) else []
            more = f"; {lossy[0]} changes what is sampled, drafter.verification does not" if lossy else ""
            raise ValueError(f"engine.vllm.{name}: {CHOSEN[name]}{more}")
        if name in SETTINGS:
            raise ValueError(f"engine.vllm.{name}: set {SETTINGS[name]} instead")
        if name not in known:
            raise ValueError(f"engine.vllm.{name}: vLLM has no engine argument of this name")


def known_arguments() -> set[str]:
    """Fields of vLLM's `AsyncEngineArgs`, read from its source, because importing it would take seconds."""
    vllm: Any = find_spec("vllm")
    module = ast.parse((Path(vllm.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    return {
        field.target.id
        for kind in module.body
        if isinstance(kind, ast.ClassDef) and kind.name in ("EngineArgs", "AsyncEngineArgs")
        for field in kind.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
