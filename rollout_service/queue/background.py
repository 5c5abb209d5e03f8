"""BackgroundGeneration: keeps the engines busy with the queue's groups, whether or not anybody is waiting for them.

- As many completions are under way as the engines can run, and some more, so that the end of a group leaves no gap.
- A group whose engine dies is generated again by the fleet; one whose front dies waits again in the queue.
- A group that an engine refuses is failed, and not tried again. So is one whose engines died in ROUNDS rounds.
- A group whose engines died in one round is a suspect. One suspect is generated at a time. So a group that kills its
  engines makes a suspect of what runs beside it, and does not have it failed.
- When a version is published, groups that can no longer be fresh enough are ended and wait again: whether finished
  (in the queue) or being generated (here).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.kept_running import kept_running
from rollout_service.fleet.member import EnginesDied, FleetError, GroupFailed, in_words
from rollout_service.protocol import BatchesStatus, WeightsOf
from rollout_service.queue.batch_queue import BatchQueue, Unavailable, Waiting
from rollout_service.telemetry import Telemetry

logger = logging.getLogger("rollout_service")
T = TypeVar("T")

OVERSUBSCRIPTION = 1.5
"""completions under way to those the engines run at the same time: a group is counted whole until its last one ends"""
LOOK_EVERY = 0.5
"""seconds between looks at the leases that are over"""
AGAIN_AFTER = 1.0
"""seconds after which a group that could not be written, or had no engine, is tried again"""
ROUNDS = 3
"""rounds, each of fleet.ATTEMPTS engines that died with the group, after which it is failed: the first may be the fault
of a group beside it, and the second of the machine"""


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
        queue.failed.on_failed = self._failed

    @property
    def version(self) -> int:
        return self.fleet.store.version("policy")

    def start(self) -> None:
        self.fleet.pushes.on_published = self._published
        self._drop_stale(self.version)
        self.loop = asyncio.create_task(kept_running("background generation", self._feed))

    async def stop(self) -> None:
        tasks = [self.loop, *(run.task for run in self.running.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self) -> None:
        while True:
            try:
                if self.queue.finished.expire_leases():
                    self.news.set()
                # Nothing is begun while something finished cannot be written: it would only be lost with the process.
                while not self.unwritten and self._has_room() and (waiting := self._next_waiting()):
                    self._begin(waiting)
            except Unavailable as error:
                logger.error("%s", error)
            self.wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):  # wait_for can lose a cancellation
                    await self.wake.wait()

    def _has_room(self) -> bool:
        under_way = sum(run.waiting.request.n for run in self.running.values())
        return under_way == 0 or under_way < self.limit

    def _next_waiting(self) -> Waiting | None:
        suspects = not any(run.waiting.rounds for run in self.running.values())
        return self.queue.next_waiting(self.running.keys(), suspects)

    def _begin(self, waiting: Waiting) -> None:
        task = asyncio.create_task(self._generate(waiting))
        self.running[waiting.arrival] = Run(waiting, self.version, task)
        # Not in a `finally` of the task: one that is cancelled before its first step never gets there.
        task.add_done_callback(lambda _: self._ended(waiting))

    def _ended(self, waiting: Waiting) -> None:
        del self.running[waiting.arrival]
        self.wake.set()
        self.news.set()

    async def _generate(self, waiting: Waiting) -> None:
        """Ends with the group finished, failed, or to wait again."""
        arrival = waiting.arrival
        try:
            group = await self.fleet.generate(waiting.request)
            await self._write(lambda: self.queue.finish(arrival, group, self.version))
            self.telemetry.finished(group)
        except GroupFailed as error:
            await self._fail(arrival, str(error))
        except EnginesDied as error:
            await self._engines_died(arrival, error)
        except FleetError as error:
            logger.error("%s; the group waits in the queue", error)
            await asyncio.sleep(AGAIN_AFTER)
        except Exception as error:  # of this service: it would come again with the group
            logger.exception("group %s could not be generated", waiting.request.id)
            await self._fail(arrival, in_words(error))

    async def _engines_died(self, arrival: int, error: EnginesDied) -> None:
        rounds = await self._write(lambda: self.queue.engines_died(arrival))
        if rounds >= ROUNDS:
            await self._fail(arrival, f"{error}, in each of {rounds} rounds")
            return
        logger.error("%s; it waits in the queue", error)
        await asyncio.sleep(AGAIN_AFTER)

    async def _fail(self, arrival: int, reason: str) -> None:
        await self._write(lambda: self.queue.fail(arrival, reason))

    def _failed(self, name: str, reason: str) -> None:
        logger.error("group %s failed and is not tried again: %s", name, reason)
        self.telemetry.failed.inc()

    async def _write(self, change: Callable[[], T]) -> T:
        """The queue's answer to a change, once there is room for it."""
        self.unwritten += 1
        try:
            while True:
                try:
                    return change()
                except Unavailable as error:
                    logger.error("%s; the group is kept in memory", error)
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
        self._drop_stale(version, ended=sum(run.task.cancel() for run in too_old))
        self.wake.set()

    def _drop_stale(self, version: int, ended: int = 0) -> None:
        """`ended` groups were being generated."""
        try:
            self.queue.finished.drop_stale(version)
            self.queue.count(dropped=ended)
        except Unavailable as error:  # `lease` checks again
            logger.error("%s", error)

    def cancel(self, run: str) -> tuple[int, int]:
        """Forget a run's groups: their number, and how many of them were being generated."""
        forgotten = self.queue.cancel(run)
        ended = sum(self.running[arrival].task.cancel() for arrival in forgotten if arrival in self.running)
        return len(forgotten), ended

    def status(self) -> BatchesStatus:
        """Of the queue and of the engines that generate its groups."""
        status = self.queue.status(self.running.keys())
        status.tokens_wasted += self.fleet.wasted_tokens
        status.engines_idle = [member.idle_seconds() for member in self.fleet.members]
        return status
