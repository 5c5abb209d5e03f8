"""Carried tensors: those that a run's checkpoints copy from the policy's own, since the trainer does not train them."""

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from drafters.files.checkpoint_folder import MTP_FILE, read_tensors, write_index
from drafters.kinds.mtp import is_mtp

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Carried:
    """Nothing, for a policy that comes from no folder."""

    generation_config: bytes | None = None
    """the policy's sampling defaults; the trainer asks the service for its own"""
    head: dict[str, Tensor] = field(default_factory=dict)
    """the policy's MTP head, which transformers does not load; a run that trains it writes its own in its place"""

    @classmethod
    def read(cls, folder: Path) -> "Carried":
        """Of the checkpoint in `folder`."""
        file = folder / GENERATION_CONFIG
        return cls(file.read_bytes() if file.is_file() else None, read_tensors(folder, is_mtp))

    def write(self, folder: Path) -> None:
        """Into a checkpoint that transformers has written."""
        if self.generation_config is None:  # transformers writes one of its own
            (folder / GENERATION_CONFIG).unlink(missing_ok=True)
        else:
            (folder / GENERATION_CONFIG).write_bytes(self.generation_config)
        if self.head:
            save_file(self.head, folder / MTP_FILE, metadata={"format": "pt"})
            write_index(folder)
