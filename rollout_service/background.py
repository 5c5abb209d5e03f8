"""BackgroundGeneration: keeps the engines busy with the queue's groups, whether or not anybody is waiting for them.

- As many completions are under way as the engines can run, and some more, so that the end of a group leaves no gap.
- A group whose engine dies is generated again by the fleet; one whose front dies waits again in the queue.
- When a version is published, groups that can no longer be fresh enough are ended and wait again: whether finished
  (in the queue) or being generated (here).
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from rollout_service.batches import BatchQueue, Unavailable, Waiting
from rollout_service.fleet import Fleet
from rollout_service.member import FleetError
from rollout_service.protocol import Group, WeightsOf
from rollout_service.telemetry import Telemetry

logger = logging.getLogger("rollout_service")

OVERSUBSCRIPTION = 1.5
"""completions under way to those the engines run at the same time: a group is counted whole until its last one ends"""
LOOK_EVERY = 0.5
"""seconds between looks at the leases that are over"""
AGAIN_AFTER = 1.0
"""seconds after which a finished group that could not be written is tried again"""


@dataclass(frozen=True)
class Run:
    waiting: Waiting
    version: int
    """in service when it was begun"""
    task: asyncio.Task[None]


class BackgroundGeneration:
    """Use: `start()` within a running loop, `await stop()`. `news` is set when there may be more to lease."""

    def __init__(self, fleet: Fleet, queue: BatchQueue, telemetry: Telemetry):
        self.fleet, self.queue, self.telemetry = fleet, queue, telemetry
        config = fleet.config
        self.limit = OVERSUBSCRIPTION * config.engines * config.engine.max_num_seqs
        self.running: dict[int, Run] = {}
        self.unwritten = 0
        self.wake = asyncio.Event()
        self.news = asyncio.Event()

    @property
    def version(self) -> int:
        return self.fleet.store.sets["policy"].status.version

    def start(self) -> None:
        self.fleet.pushes.on_published = self._published
        self.queue.drop_stale(self.version)
        self.loop = asyncio.create_task(self._feed())

    async def stop(self) -> None:
        tasks = [self.loop, *(run.task for run in self.running.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self) -> None:
        while True:
            try:
                if self.queue.expire_leases():
                    self.news.set()
                # Nothing is begun while something finished cannot be written: it would only be lost with the process.
                while not self.unwritten and self._has_room() and (waiting := self.queue.next_waiting()):
                    task = asyncio.create_task(self._generate(waiting))
                    self.running[waiting.arrival] = Run(waiting, self.version, task)
            except Unavailable as error:
                logger.error("%s", error)
            self.wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):  # wait_for can lose a cancellation
                    await self.wake.wait()

    def _has_room(self) -> bool:
        under_way = sum(run.waiting.request.n for run in self.running.values())
        return under_way == 0 or under_way < self.limit

    async def _generate(self, waiting: Waiting) -> None:
        try:
            group = await self.fleet.generate(waiting.request)
            await self._write(waiting, group)
            self.telemetry.finished(group)
        except FleetError as error:
            logger.error("%s; it waits in the queue", error)
            await asyncio.sleep(AGAIN_AFTER)
        finally:
            self.queue.give_back(waiting.arrival)
            self.running.pop(waiting.arrival, None)
            self.wake.set()
            self.news.set()

    async def _write(self, waiting: Waiting, group: Group) -> None:
        self.unwritten += 1
        try:
            while True:
                try:
                    self.queue.finish(waiting.arrival, group, self.version)
                    return
                except Unavailable as error:
                    logger.error("%s; the finished group is kept in memory", error)
                    await asyncio.sleep(AGAIN_AFTER)
        finally:
            self.unwritten -= 1

    def _published(self, of: WeightsOf, version: int) -> None:
        if of != "policy":
            return
        too_old = [
            run
            for run in self.running.values()
            if run.waiting.max_staleness is not None and run.version < version - run.waiting.max_staleness
        ]
        for run in too_old:
            run.task.cancel()
        try:
            self.queue.drop_stale(version)
            self.queue.count(dropped=len(too_old))
        except Unavailable as error:  # `lease` checks again
            logger.error("%s", error)
        self.wake.set()

    def cancel(self, run: str) -> int:
        """Forget a run's groups. Returns how many were being generated."""
        ended = self.queue.cancel(run)
        for arrival in ended:
            if arrival in self.running:
                self.running[arrival].task.cancel()
        return len(ended)
