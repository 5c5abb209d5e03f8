"""A small language model of the policy's vocabulary drafts by itself; it reads nothing of the policy."""

from pathlib import Path
from typing import Any

from drafters.drafter import Drafter


class DraftModelDrafter(Drafter):
    kind = "draft_model"

    def speculative_config(self) -> dict[str, Any] | None:
        return self._sampled("draft_model", model=self._model())

    def owns(self, name: str) -> bool:
        return True

    def checkpoint(self, policy: Path) -> Path | None:
        return Path(self._model())
