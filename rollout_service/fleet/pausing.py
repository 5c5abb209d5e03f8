"""Pausing: a pause of the whole fleet, which clients own. It lasts until a client resumes it.

- Every engine has it. One that restarts takes it before it comes into service.
- Inside of it weights are pushed as ever, and stay paused afterwards (engine/pausing.py).
- A group that a pause ends is generated again, and what waits in the queue stays there.
- Sleep is a pause that frees memory, on CUDA only. Engines that sleep take no weights.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rollout_service.engine.pausing import PauseMode
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.member import FleetError, Member
from rollout_service.transports.transport import refused

logger = logging.getLogger("rollout_service")

ALL_MEMORY = frozenset({"weights", "kv_cache"})
"""what a sleep frees, by vLLM's names"""
SCHEDULING = "scheduling"
"""vLLM's tag of a sleep that frees nothing"""


@dataclass(frozen=True)
class Pause:
    """Why nothing is generated."""

    mode: PauseMode
    clear_cache: bool
    since: float
    """seconds since the epoch"""
    asleep: frozenset[str] = frozenset()
    """memory that is freed"""


class Pausing:
    """Use: `await fleet.pausing.pause("keep", clear_cache=False)`."""

    def __init__(self, controls: Controls, pushing: asyncio.Lock, frees_memory: bool):
        """`pushing` is held while engines load weights. `frees_memory`: whether they can sleep; if not, sleep is a
        pause."""
        self.controls, self.pushing, self.frees_memory = controls, pushing, frees_memory
        self.now: Pause | None = None
        self._changing = asyncio.Lock()  # one change reaches all engines before the next one begins

    @property
    def paused(self) -> bool:
        return self.now is not None

    def check_awake(self) -> None:
        """Raises RefusedUpdate when engines have no memory for weights."""
        if self.frees_memory and self.now is not None and "weights" in self.now.asleep:
            message = "the engines sleep and have no memory for weights; POST /wake_up?tags=weights first"
            raise refused("weights", message, status=409)

    async def pause(self, mode: PauseMode, clear_cache: bool) -> None:
        """Returns when no engine generates any more."""
        async with self._changing:
            asleep = self.now.asleep if self.now is not None else frozenset()
            self._set(Pause(mode, clear_cache, self.now.since if self.now is not None else time.time(), asleep))
            if not asleep:
                await self.controls.of_each("pause", mode, clear_cache)

    async def resume(self) -> None:
        """Raises RefusedUpdate when the engines sleep."""
        async with self._changing:
            if self.now is not None and self.now.asleep:
                raise refused("sleep", "the engines sleep, and cannot resume; POST /wake_up instead", status=409)
            self._set(None)
            await self.controls.of_each("resume")

    async def sleep(self, mode: PauseMode) -> None:
        """Pause, and free the engines' memory where they can."""
        async with self._changing, self.pushing:
            if self.now is not None and self.now.asleep == ALL_MEMORY:
                return
            self._set(Pause(mode, True, time.time(), ALL_MEMORY))
            if self.frees_memory:
                await self.controls.of_each("sleep", mode)
            else:
                await self.controls.of_each("pause", mode, True)

    async def wake_up(self, tags: Iterable[str] | None) -> bool:
        """Take back the memory of `tags`, or all. Engines resume once all of it is back. Returns whether it is. Raises
        FleetError when an engine cannot; the service then sleeps as before."""
        async with self._changing:
            if self.now is None:
                return True
            left = frozenset() if tags is None else self.now.asleep - frozenset(tags)
            back = sorted(self.now.asleep - left)
            was = self.now
            self._set(replace(was, asleep=left) if left else None)  # first, for engines that start meanwhile
            try:
                if self.frees_memory and back:
                    await self.controls.of_each("wake_up", back)
                elif not left:
                    await self.controls.of_each("resume")
            except FleetError:  # as where a trainer uses the memory: they sleep on
                self._set(was)
                raise
            return not left

    async def catch_up(self, member: Member) -> None:
        """Pause an engine that has just started as the others are. Nothing may be awaited between this and its coming
        into service."""
        seen: Pause | None = None
        sleeps = False
        while seen != self.now:
            seen = self.now
            if seen is None:
                await member.actor.control.remote(*(("wake_up", None) if sleeps else ("resume",)))
            elif seen.asleep == ALL_MEMORY and self.frees_memory:
                await member.actor.control.remote("sleep", seen.mode)
                sleeps = True
            elif sleeps and seen.asleep:  # a client woke some of it meanwhile
                await member.actor.control.remote("wake_up", sorted(ALL_MEMORY - seen.asleep))
            else:
                await member.actor.control.remote("pause", seen.mode, seen.clear_cache)

    def _set(self, now: Pause | None) -> None:
        was, self.now = self.now, now
        if (was is None) == (now is None):
            return
        if now is None:
            logger.warning("a client resumed the service")
        else:
            logger.warning("a client paused the service: nothing is generated until it resumes")
