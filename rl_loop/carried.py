"""What a run's checkpoints take over from the policy's own as it is: what the trainer neither trains nor reads."""

from dataclasses import dataclass
from pathlib import Path

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Carried:
    """Nothing, for a policy that comes from no folder."""

    generation_config: bytes | None = None
    """the policy's sampling defaults; the trainer asks the service for its own"""

    @classmethod
    def read(cls, folder: Path) -> "Carried":
        """Of the checkpoint in `folder`."""
        file = folder / GENERATION_CONFIG
        return cls(file.read_bytes() if file.is_file() else None)

    def write(self, folder: Path) -> None:
        """Into a checkpoint that transformers has written."""
        if self.generation_config is None:  # transformers writes one of its own
            (folder / GENERATION_CONFIG).unlink(missing_ok=True)
        else:
            (folder / GENERATION_CONFIG).write_bytes(self.generation_config)
