"""Cut: the temperature, top-p and top-k that make a sampling distribution of logits. Imports no torch."""

from typing import Any, NamedTuple


class Cut(NamedTuple):
    """At temperature 0 the engine takes the most likely token, and returns log-probabilities of temperature 1 without
    top-p and top-k. `arguments` are then those."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def arguments(self) -> dict[str, Any]:
        return self._asdict() if self.temperature > 0.0 else Cut()._asdict()
