"""`drafters inspect FOLDER`: what a checkpoint is as a drafter, and how an engine is told to use it."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from drafters.drafter import DrafterConfig
from drafters.files.checkpoint_folder import read_config, read_tensors, weight_files
from drafters.files.model_folder import resolve_model
from drafters.kinds.mtp import is_mtp
from drafters.registry import make_drafter


def inspect(model: str, console: Console | None = None) -> dict[str, Any]:
    """Prints and returns the facts. Raises ValueError when the folder holds no checkpoint."""
    folder = resolve_model(model, "folder")
    if not weight_files(folder):
        raise ValueError(f"{folder} is no checkpoint: it needs config.json and safetensors files")
    facts = describe(folder)
    table = Table(show_header=False, box=None, title=str(folder), title_justify="left")
    for name, value in facts.items():
        table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
    (console or Console()).print(table)
    return facts


def describe(folder: Path) -> dict[str, Any]:
    config, sizes = read_config(folder), tensor_sizes(folder)
    block = config.get("transformer_layer_config", config)
    facts: dict[str, Any] = {
        "architecture": ", ".join(config.get("architectures") or ["?"]),
        "tensors": len(sizes),
        "parameters": f"{sum(sizes.values()):,}",
        "vocabulary": block.get("vocab_size"),
    }
    if config.get("speculators_model_type") == "eagle3" or any("Eagle3" in a for a in config.get("architectures", [])):
        return {"kind": "eagle3"} | facts | eagle3_facts(folder, config) | usage("eagle3", str(folder))
    mtp = {name: size for name, size in sizes.items() if is_mtp(name)}
    if mtp:
        own = {"head tensors": len(mtp), "head parameters": f"{sum(mtp.values()):,}"}
        return {"kind": "mtp (a policy with a head)"} | facts | own | usage("mtp", None)
    return {"kind": "draft_model, or a policy without a head"} | facts | usage("draft_model", str(folder))


def eagle3_facts(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from drafters.learners.layouts import LAYERS, VARIANTS, eagle3_layout

    of_eagle = config.get("eagle_config") or {}
    drafted = config.get("draft_vocab_size")
    names = set(read_tensors(folder, lambda name: name in ("d2t", "t2d", "embed_tokens.weight")))
    default_variants = {"norm_before_residual": True} if "speculators_model_type" in config else {}
    return {
        "layout": eagle3_layout(folder),
        "policy layers read": config.get(LAYERS) or of_eagle.get(LAYERS) or "vLLM's default: 2, N/2, N-3",
        "tokens it can draft": drafted or "all",
        "variants": ", ".join(v for v in VARIANTS if config.get(v, default_variants.get(v))) or "none",
        "also holds": ", ".join(sorted(names)) or "nothing",
    }


def usage(kind: str, model: str | None) -> dict[str, Any]:
    drafter = make_drafter(DrafterConfig(kind=kind, model=model))
    return {"vLLM's speculative_config": drafter.speculative_config()}


def tensor_sizes(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            found |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in names}
    return found
