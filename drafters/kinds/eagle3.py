"""Eagle3 (arXiv 2503.01840): one decoder layer over fused hidden states of three layers of the policy."""

from pathlib import Path
from typing import Any

from drafters.drafter import Drafter


class Eagle3Drafter(Drafter):
    kind = "eagle3"
    reads = ("model",)

    def speculative_config(self) -> dict[str, Any] | None:
        return self._sampled("eagle3", model=self._model())

    def owns(self, name: str) -> bool:
        # The embedding may stand in the checkpoint, but vLLM shares the policy's module: an update would overwrite it.
        return not name.startswith("embed_tokens.")

    def checkpoint(self, policy: Path) -> Path | None:
        return Path(self._model())
