"""Model runners of vLLM, and what a kind of drafter does on each. An engine on a CPU has runner v1, on a GPU v2.

Each kind has one line for each runner (`Drafter.on`). vLLM's arguments, the measurement of step costs and the reasons
in GET /v1/speculation follow from these lines.
"""

from typing import Literal, NamedTuple

Runner = Literal["v1", "v2"]


class OnRunner(NamedTuple):
    """A kind of drafter on one runner."""

    method: str | None = None
    """vLLM's name of the kind on this runner; None for the name in `speculative_config`"""
    rests: bool = False
    """whether the drafter does nothing in a step that drafts nothing; if not, its first forward pass runs there"""
    fills: bool = True
    """whether every step has as many drafts as the schedule says; if not, it has only those that the drafter finds"""
