"""Member: one engine as the fleet knows it, and the errors for what engines could not do."""

import time
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayTaskError

from drafters.schedule import StepCosts
from rollout_service.fleet.engine_http import EngineHttp


def in_words(error: BaseException) -> str:
    """The error in one line. For an error in an actor it is the cause, without the traceback that Ray puts into it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


class FleetError(RuntimeError):
    """The engines could not do what was asked, after all attempts."""


class GroupFailed(FleetError):
    """An engine refused the group, and would refuse it again. The message is its reason, in one line."""


class EnginesDied(FleetError):
    """Every engine that took the group died with it."""


class HungUp(FleetError):
    """The service stops, so the request was ended."""


@dataclass
class Member:
    """One engine as the fleet sees it."""

    index: int
    actor: Any
    in_service: bool = False
    load: int = 0  # completions under way
    restarts: int = 0
    costs: StepCosts | None = None  # measured at its first start
    http: EngineHttp | None = None  # to the HTTP server of the actor that was started last
    idle_since: float | None = field(default_factory=time.monotonic)
    idle_before: float = 0.0

    async def connect(self, address: str, key: str) -> None:
        """Use the HTTP server of the actor that has just started. Connections to the actor before it are closed."""
        await self.disconnect()
        self.http = EngineHttp(address, key)

    async def disconnect(self) -> None:
        if self.http is not None:
            await self.http.close()

    def add_load(self, completions: int) -> None:
        """A negative number for completions that have ended."""
        self.load += completions
        if self.load == 0:
            self.idle_since = time.monotonic()
        elif self.idle_since is not None:
            self.idle_before, self.idle_since = self.idle_seconds(), None

    def idle_seconds(self) -> float:
        """Seconds since the start in which it had nothing to generate."""
        return self.idle_before + (time.monotonic() - self.idle_since if self.idle_since is not None else 0.0)
