"""BackgroundGeneration: keeps the engines busy with the queue's groups, whether or not anybody is waiting for them.

- Somewhat more completions are under way than the engines can run at once, so that the end of a group leaves no gap.
- If an engine dies, the fleet generates its group again. If the front dies, the group waits in the queue again.
- A group that an engine refuses is failed, and not tried again. So is a group whose engines died in ROUNDS rounds.
- A group whose engines died in one round is a suspect. Only one suspect is generated at a time. So a group that kills
  its engines makes suspects of the groups beside it, but does not make them fail.
- When a version is published, groups that can no longer be fresh enough wait again, whether they are finished (in the
  queue) or being generated (here).
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
"""completions under way over those that the engines run at once; a group counts whole until its last completion ends"""
LOOK_EVERY = 0.5
"""seconds between checks for leases that are over"""
AGAIN_AFTER = 1.0
"""seconds after which a group that could not be written, or had no engine, is tried again"""
ROUNDS = 3
"""rounds after which a group is failed; in each round routing.ATTEMPTS engines died with it. The first round may be the
fault of a group beside it, and the second that of the machine"""


@dataclass(frozen=True)
class Run:
    waiting: Waiting
    version: int
    """version in service when its generation began"""
    task: asyncio.Task[None]


class BackgroundGeneration:
    """Use: `start()` within a running loop, `await stop()`. `news` is set when there may be more to lease."""

    def __init__(self, fleet: Fleet, queue: BatchQueue, telemetry: Telemetry):
        self.fleet, self.queue, self.telemetry = fleet, queue, telemetry
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
                # Nothing new begins while a finished group cannot be written: it would be lost with the process.
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
        limit = OVERSUBSCRIPTION * len(self.fleet.members) * self.fleet.config.engine.max_num_seqs
        return under_way == 0 or under_way < limit

    def _next_waiting(self) -> Waiting | None:
        suspects = not any(run.waiting.rounds for run in self.running.values())
        return self.queue.next_waiting(self.running.keys(), suspects)

    def _begin(self, waiting: Waiting) -> None:
        task = asyncio.create_task(self._generate(waiting))
        self.running[waiting.arrival] = Run(waiting, self.version, task)
        # Not in a `finally` of the task, which a task that is cancelled before its first step never reaches.
        task.add_done_callback(lambda _: self._ended(waiting))

    def _ended(self, waiting: Waiting) -> None:
        del self.running[waiting.arrival]
        self.wake.set()
        self.news.set()

    async def _generate(self, waiting: Waiting) -> None:
        """Generate the group. Afterwards it is finished, failed, or waiting again."""
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
        except Exception as error:  # an error of this service, which the group would cause again
            logger.exception("group %s could not be generated", waiting.request.id)
            await self._fail(arrival, in_words(error))

    async def _engines_died(self, arrival: int, error: EnginesDied) -> None:
        rounds = await self._write(lambda: self.queue.engines_died(arrival))
        if rounds >= ROUNDS:
            await self._fail(arrival, f"{error}, in each of {rounds} rounds")
            return
        logger.error("%s; the group waits in the queue", error)
        await asyncio.sleep(AGAIN_AFTER)

    async def _fail(self, arrival: int, reason: str) -> None:
        await self._write(lambda: self.queue.fail(arrival, reason))

    def _failed(self, name: str, reason: str) -> None:
        logger.error("group %s failed and is not tried again: %s", name, reason)
        self.telemetry.failed.inc()

    async def _write(self, change: Callable[[], T]) -> T:
        """Make a change in the queue as soon as there is room for it. Returns what the change returns."""
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
        """`ended`: number of groups whose generation was ended."""
        try:
            self.queue.finished.drop_stale(version)
            self.queue.count(dropped=ended)
        except Unavailable as error:  # `lease` checks again
            logger.error("%s", error)

    def cancel(self, run: str) -> tuple[int, int]:
        """Forget a run's groups. Returns their number, and how many of them were being generated."""
        forgotten = self.queue.cancel(run)
        ended = sum(self.running[arrival].task.cancel() for arrival in forgotten if arrival in self.running)
        return len(forgotten), ended

    def status(self) -> BatchesStatus:
        """The status of the queue, and of the engines that generate its groups."""
        status = self.queue.status(self.running.keys())
        status.tokens_wasted += self.fleet.wasted_tokens
        status.engines_idle = [member.idle_seconds() for member in self.fleet.members]
        return status
