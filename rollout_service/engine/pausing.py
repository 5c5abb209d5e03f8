"""Pausing of one engine: by a client, for as long as the client wants, and by a weight update, for a moment.

- One thing at a time pauses or resumes vLLM's scheduler: it has one state, which does not count who asked.
- A weight update resumes the engine only if no client has paused it.
- An update inside a client's pause never waits for running completions: those that the client froze would never end.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

PauseMode = Literal["abort", "wait", "keep"]
"""vLLM's names for what happens to running completions: they end, they finish first, or they are frozen"""
Pause = Callable[[PauseMode, bool], Awaitable[None]]
SLEEP_LEVEL = 1
"""vLLM's level of sleep that keeps the weights in host memory. Level 2 is served as this one: it would discard the
weights, and neither a drafter's nor the checkpoint's could be loaded again in place"""


class EnginePausing:
    """Use: `async with pausing.for_an_update() as pause: await pause(mode, clear_cache)`."""

    def __init__(self, llm: Any):
        self.llm = llm
        self.by_client = False
        self._changing = asyncio.Lock()

    async def pause(self, mode: PauseMode, clear_cache: bool) -> None:
        """Returns when nothing is generated any more. With `wait` this takes as long as the longest running completion;
        an abort of all requests shortens it."""
        self.by_client = True  # at once, so that an update under way does not resume what comes next
        async with self._changing:
            await self.llm.pause_generation(mode=mode, clear_cache=clear_cache)

    async def resume(self) -> None:
        async with self._changing:
            self.by_client = False
            await self.llm.resume_generation()

    async def sleep(self, mode: PauseMode) -> None:
        """Pause, and free the GPU's memory: the weights move to host memory, and the KV cache is discarded."""
        self.by_client = True
        async with self._changing:
            await self.llm.sleep(SLEEP_LEVEL, mode)

    async def wake_up(self, tags: list[str] | None) -> None:
        """Take back the memory of `tags`, or all. vLLM resumes once all of it is back."""
        async with self._changing:
            if await self.llm.wake_up(tags):
                self.by_client = False

    @asynccontextmanager
    async def for_an_update(self) -> AsyncIterator[Pause]:
        """A context in which the weights change. It gives the function that pauses the engine, which resumes afterwards
        unless a client has paused it."""

        async def pause(mode: PauseMode, clear_cache: bool) -> None:
            allowed: PauseMode = "keep" if self.by_client else mode
            await self.llm.pause_generation(mode=allowed, clear_cache=clear_cache)

        async with self._changing:
            try:
                yield pause
            finally:
                if not self.by_client:
                    await self.llm.resume_generation()
