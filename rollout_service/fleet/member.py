"""Member: one engine as the fleet knows it, and the errors for what engines could not do."""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray.exceptions import RayTaskError

from drafters.schedule import StepCosts
from rollout_service.fleet.engine_http import EngineHttp

T = TypeVar("T")


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


class LeftService(Exception):
    """The engine went out of service while it was asked: it is silent, or was taken away."""


@dataclass
class Member:
    """One engine as the fleet sees it."""

    index: int
    actor: Any
    in_service: bool = False
    joining: bool = False  # it is being added to a running fleet
    draining: bool = False  # it is being taken away, and takes no new requests
    node: str = ""  # Ray's id of its node
    load: int = 0  # completions under way
    tokens: int = 0  # of their prompts, and those that may still be generated
    restarts: int = 0
    costs: StepCosts | None = None  # measured at its first start
    http: EngineHttp | None = None  # to the HTTP server of the actor that was started last
    idle_since: float | None = field(default_factory=time.monotonic)
    idle_before: float = 0.0
    cache: object = field(default_factory=object)
    """stands for the prefixes that it has; another one each time it comes into service"""
    heard: float = 0.0
    """when it last gave a sign of life, by `time.monotonic`, besides its answers to the watch"""
    patience: float = 0.0
    """seconds that it may be silent beyond `engine_timeout`, because it is busy"""
    _left: "asyncio.Future[None] | None" = None

    async def connect(self, address: str, key: str) -> None:
        """Use the HTTP server of the actor that has just started. Connections to the actor before it are closed."""
        await self.disconnect()
        self.http = EngineHttp(address, key)

    async def disconnect(self) -> None:
        if self.http is not None:
            await self.http.close()

    def leave(self) -> None:
        """Go out of service, until the engine has started again."""
        self.in_service = False
        self.cache = object()
        if self._left is not None:
            self._left.set_result(None)
            self._left = None

    async def answer(self, call: Awaitable[T]) -> T:
        """What the engine answers. Raises LeftService if it goes out of service before; what it then still answers is
        dropped."""
        if self._left is None:
            self._left = asyncio.get_running_loop().create_future()
        left, asked = self._left, asyncio.ensure_future(call)
        both: set[asyncio.Future[Any]] = {left, asked}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not (left.done() and asked.exception()):
            return asked.result()
        asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        raise LeftService("it went out of service")

    @contextmanager
    def busy(self, seconds: float) -> Iterator[None]:
        """A context in which its core process may be silent for so many seconds more."""
        self.patience += seconds
        try:
            yield
        finally:
            self.patience -= seconds
            self.heard = time.monotonic()

    def add_load(self, completions: int, tokens: int) -> None:
        """Negative numbers for what has ended."""
        self.load += completions
        self.tokens += tokens
        if self.load == 0:
            self.idle_since = time.monotonic()
        elif self.idle_since is not None:
            self.idle_before, self.idle_since = self.idle_seconds(), None

    def idle_seconds(self) -> float:
        """Seconds since the start in which it had nothing to generate."""
        return self.idle_before + (time.monotonic() - self.idle_since if self.idle_since is not None else 0.0)
