"""No drafter: the policy decodes one token a step. The baseline of every comparison."""

from typing import Any

from drafters.drafter import Drafter


class NoDrafter(Drafter):
    kind = "none"
    samples = False

    def speculative_config(self) -> dict[str, Any] | None:
        return None
