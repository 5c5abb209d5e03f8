"""A copy of a checkpoint with noise: another policy or drafter of the same shapes, to push."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.files.checkpoint_folder import weight_files

SEED = 3


def noisy_copy(folder: Path, copy: Path, belongs: Callable[[str], bool], relative: float) -> Path:
    """Copies `folder` to `copy`, a new folder. The matrices whose names `belongs` accepts get noise, of a standard
    deviation that is `relative` to that of the matrix. Returns `copy`."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    random = torch.Generator().manual_seed(SEED)

    def noisy(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=random)
        return tensor + (relative * tensor.float().std() * noise).to(tensor.dtype)

    for file in weight_files(folder):
        tensors = load_file(file)
        made = {name: noisy(t) if belongs(name) and t.dim() > 1 else t for name, t in tensors.items()}
        save_file(made, copy / file.name, metadata={"format": "pt"})
    return copy
