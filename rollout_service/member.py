"""Member: what the fleet knows of one engine; and the error when engines could not do what was asked."""

import time
from dataclasses import dataclass, field
from typing import Any

from drafters.schedule import StepCosts


class FleetError(RuntimeError):
    """The engines could not do what was asked, after all attempts."""


@dataclass
class Member:
    """One engine as the fleet sees it."""

    index: int
    actor: Any
    in_service: bool = False
    load: int = 0  # completions under way
    restarts: int = 0
    costs: StepCosts | None = None  # measured at its first start
    idle_since: float | None = field(default_factory=time.monotonic)
    idle_before: float = 0.0

    def add_load(self, completions: int) -> None:
        """Fewer than nothing when they have ended."""
        self.load += completions
        if self.load == 0:
            self.idle_since = time.monotonic()
        elif self.idle_since is not None:
            self.idle_before, self.idle_since = self.idle_seconds(), None

    def idle_seconds(self) -> float:
        """With nothing to generate, since the start."""
        return self.idle_before + (time.monotonic() - self.idle_since if self.idle_since is not None else 0.0)
