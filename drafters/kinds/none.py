"""No drafter: the policy decodes one token a step, as the baseline of every comparison."""

from typing import Any

from drafters.drafter import Drafter, DraftSettings


class NoDrafter(Drafter):
    kind = "none"
    samples = False

    def unread(self, config: DraftSettings) -> list[str]:
        """No field is refused: `--drafter.kind none` turns a configured drafter off, and its settings may stay."""
        return []

    def speculative_config(self) -> dict[str, Any] | None:
        return None
