"""`drafters inspect FOLDER`: the kind of drafter that a checkpoint is, and the engine arguments that load it."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from drafters.files.checkpoint_folder import read_config, weight_files
from drafters.files.model_folder import resolve_model
from drafters.registry import KINDS, DrafterConfig, make_drafter


def inspect(model: str, console: Console | None = None) -> dict[str, Any]:
    """Prints and returns the facts about a checkpoint. Raises ValueError when the folder holds none."""
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
    for kind in reversed(KINDS.values()):
        own = kind.recognised(config, sizes)
        if own is not None:
            drafter = DrafterConfig(kind=kind.kind, model=str(folder) if kind.has_folder else None)
            usage = {"vLLM's speculative_config": make_drafter(drafter).speculative_config()}
            return {"kind": kind.kind} | facts | own | usage
    raise ValueError(f"{folder} is no checkpoint of {', '.join(KINDS)}")


def tensor_sizes(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            found |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in names}
    return found
