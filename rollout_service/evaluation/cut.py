"""Cut: the temperature, top-p and top-k that make a sampling distribution of logits. Imports no torch."""

from typing import Any, NamedTuple


class Cut(NamedTuple):
    """Temperature 0 is read as 1, uncut: what the engine's log-probabilities are of, where it takes the most likely
    token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def arguments(self) -> dict[str, Any]:
        return self._asdict() if self.temperature > 0.0 else Cut()._asdict()
