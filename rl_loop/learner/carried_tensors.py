"""Carried tensors and sampling defaults: what a run's checkpoints copy from the policy's, since it is not trained."""

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from drafters.files.checkpoint_folder import MTP_FILE, read_tensors, write_index
from drafters.kinds.mtp import is_mtp

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Carried:
    """What is copied. It is empty for a policy that does not come from a folder."""

    generation_config: bytes | None = None
    """the policy's sampling defaults, which the trainer does not use"""
    head: dict[str, Tensor] = field(default_factory=dict)
    """the policy's MTP head, which transformers does not load; a run that trains the head overwrites this copy"""

    @classmethod
    def read(cls, folder: Path) -> "Carried":
        """What a checkpoint in `folder` has."""
        file = folder / GENERATION_CONFIG
        return cls(file.read_bytes() if file.is_file() else None, read_tensors(folder, is_mtp))

    def write(self, folder: Path) -> None:
        """Add it to a checkpoint that transformers has written."""
        if self.generation_config is None:  # remove the one that transformers wrote
            (folder / GENERATION_CONFIG).unlink(missing_ok=True)
        else:
            (folder / GENERATION_CONFIG).write_bytes(self.generation_config)
        if self.head:
            save_file(self.head, folder / MTP_FILE, metadata={"format": "pt"})
            write_index(folder)
