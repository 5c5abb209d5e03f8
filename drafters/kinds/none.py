"""No drafter: the policy decodes one token a step. The baseline of every comparison."""

from typing import Any

from drafters.drafter import OF_SOME_KINDS, Drafter


class NoDrafter(Drafter):
    kind = "none"
    reads = OF_SOME_KINDS  # for when it is on again: `--drafter.kind none` turns a configured drafter off
    samples = False

    def speculative_config(self) -> dict[str, Any] | None:
        return None
