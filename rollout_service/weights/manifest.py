"""A checkpoint folder's tensors by name, shape and dtype, and what is wrong with an update of them.

Shapes and dtypes are read from the safetensors headers; no tensor is loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from drafters.files.checkpoint_folder import is_unused_buffer, read_config, weight_files
from rollout_service.protocol import Problem

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOATING = {"F64", "F32", "BF16", "F16"}


class TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    """as safetensors writes it: F32, BF16, I64, ..."""


def file_tensors(file: Path) -> dict[str, TensorSpec]:
    """Raises ValueError when the file is not safetensors."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: _spec(tensors.get_slice(name)) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"not a readable safetensors file: {error}") from None


def _spec(tensor: Any) -> TensorSpec:
    return TensorSpec(tuple(tensor.get_shape()), tensor.get_dtype())


def checkpoint_tensors(folder: Path, belongs: Callable[[str], bool]) -> dict[str, TensorSpec]:
    """The model's tensors in a checkpoint folder whose names `belongs` accepts. A tied output head is not counted, nor
    a buffer that nobody loads."""
    found: dict[str, TensorSpec] = {}
    for file in weight_files(folder):
        found |= file_tensors(file)
    config = read_config(folder)
    if config.get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    return {name: spec for name, spec in found.items() if belongs(name) and not is_unused_buffer(name)}


def problems(update: dict[str, TensorSpec], expected: dict[str, TensorSpec], dtype: str) -> list[Problem]:
    """Everything that keeps `update` from replacing `expected` as a whole in an engine of `dtype` (e.g. float32).

    An update may hold buffers that nobody loads, as the checkpoint may: the engine passes over them.
    """
    found = [
        Problem(field=name, message="missing: an update holds every tensor") for name in expected if name not in update
    ]
    for name, (shape, given) in update.items():
        if is_unused_buffer(name):
            continue
        if name not in expected:
            found.append(Problem(field=name, message="unknown: the checkpoint in service has no tensor of this name"))
            continue
        wanted = expected[name]
        wanted_dtype = DTYPES[dtype] if wanted.dtype in FLOATING else wanted.dtype
        if shape != wanted.shape:
            found.append(Problem(field=name, message=f"shape {list(shape)}, expected {list(wanted.shape)}"))
        if given != wanted_dtype:
            found.append(Problem(field=name, message=f"dtype {given}, expected {wanted_dtype}"))
    return found
