"""Checkpoint folders: the tensors that they hold, and copies that leave some tensors out."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.files.model_folder import PATTERNS
from drafters.files.text_lines import read_text

INDEX = "model.safetensors.index.json"
MTP_FILE = "mtp.safetensors"
"""the file of an MTP head that is stored apart from the policy"""
WITHOUT_INDEX = ("model.safetensors", MTP_FILE)
"""the files of a checkpoint that has no index"""
UNUSED_BUFFER = re.compile(
    r"\b(rotary_emb|rotary_pos_emb)\.(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(bias|masked_bias)$"
)
"""buffers in older checkpoints: rotary frequencies, and the causal mask of GPT-2 and related models. vLLM and
transformers compute these buffers and never load them (vLLM 0.32: models/utils.py, models/gpt2.py)"""


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ValueError, which names the file, when it is not JSON."""
    file = folder / "config.json"
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights.

    These are the files of the index. A folder without an index has `model.safetensors`, `mtp.safetensors` or both.
    Other files beside them, such as an adapter, or the same weights in one file, are not part of the model. If there is
    neither an index nor such a file, every safetensors file counts, as in vLLM.
    """
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    usual = [folder / name for name in WITHOUT_INDEX if (folder / name).is_file()]
    return usual or sorted(folder.glob("*.safetensors"))


def is_unused_buffer(name: str) -> bool:
    """Whether a checkpoint's tensor is a buffer that neither engine nor trainer loads."""
    return UNUSED_BUFFER.search(name) is not None


def read_tensors(folder: Path, belongs: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The model's tensors whose names `belongs` accepts, without unused buffers."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if belongs(name) and not is_unused_buffer(name)]  # noqa: SIM118
            found |= {name: tensors.get_tensor(name) for name in names}
    return found


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor, read from a safetensors header without loading the tensor."""

    shape: tuple[int, ...]
    dtype: str
    """as safetensors writes it: F32, BF16, I64, ..."""


def tensor_specs(file: Path) -> dict[str, TensorSpec]:
    """Raises ValueError when the file is not safetensors."""
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: TensorSpec(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"not a readable safetensors file: {error}") from None


def checkpoint_specs(folder: Path, belongs: Callable[[str], bool]) -> dict[str, TensorSpec]:
    """Specs of the model's tensors whose names `belongs` accepts, without unused buffers and a tied output head."""
    found: dict[str, TensorSpec] = {}
    for file in weight_files(folder):
        found |= tensor_specs(file)
    if read_config(folder).get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    return {name: spec for name, spec in found.items() if belongs(name) and not is_unused_buffer(name)}


def tensor_names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def copy_policy(source: Path, target: Path, *, without: Callable[[str], bool], changes: dict[str, Any]) -> None:
    """Copies `source` to `target`, without the tensors that `without` accepts, and with `changes` to `config.json`.

    Unchanged files become hard links if the file system allows it, because a policy may be large.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in _files(source):
        copy = target / file.name
        copy.unlink(missing_ok=True)
        if file.suffix == ".safetensors" and any(map(without, tensor_names(file))):
            kept = {name: t for name, t in load_file(file).items() if not without(name)}
            if kept:
                save_file(kept, copy, metadata={"format": "pt"})
        else:
            _link(file.resolve(), copy)
    config = target / "config.json"
    changed = read_config(source) | changes
    config.unlink()
    config.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def checkpoint_names(folder: Path) -> list[str]:
    """The names of all the model's tensors in a checkpoint folder."""
    return [name for file in weight_files(folder) for name in tensor_names(file)]


def write_index(folder: Path) -> None:
    """Writes `model.safetensors.index.json` over all safetensors files of a folder. vLLM loads the files in it."""
    weight_map: dict[str, str] = {}
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        weight_map |= dict.fromkeys(tensor_names(file), file.name)
        size += file.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _files(folder: Path) -> Iterator[Path]:
    yield from weight_files(folder)
    for pattern in PATTERNS:
        if pattern != "*.safetensors":
            yield from (file for file in folder.glob(pattern) if file.name != INDEX)


def _link(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)
