"""Lives of the engines: each is made, brought into service, watched, and started again when it dies or falls silent.

- An engine is in service from the moment it holds the current weights. No version is published between its loading of
  them and its coming into service.
- An engine in service that does not answer for `engine_timeout` seconds is silent: frozen, or cut off from the front.
  It is taken out of service, and killed. Its groups are generated elsewhere, and what it still says is not delivered.
- Ray makes a new actor for one that has died or was killed, also if it was frozen. If its node is cut off, Ray does so
  once it has given the node up. An actor that lives on is empty or ends (Engine.start), so none serves old weights.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rollout_service.config import ServiceConfig
from rollout_service.engine.engine import Engine, NotStarted
from rollout_service.engine.hardware import engine_environment, interpreter
from rollout_service.fleet.kept_running import kept_running
from rollout_service.fleet.member import FleetError, Member, in_words
from rollout_service.fleet.pausing import Pausing
from rollout_service.fleet.pushes import Pushes, seconds_to_load
from rollout_service.fleet.routing import Routing
from rollout_service.weights.versions import WeightStore

logger = logging.getLogger("rollout_service")

ASK_EVERY = 2.0
"""seconds between two questions whether an engine is alive; a quarter of `engine_timeout` if that is less"""
AGAIN_AFTER = 2.0
"""seconds between two tries to start an engine whose new actor Ray has not made yet"""
STOP_WITHIN = 10.0
"""seconds an engine has to stop by itself before its actor is killed"""
REPORTED: set[str] = set()
"""functions of vLLM whose replacement was reported, because every engine of a machine replaces the same ones"""


class EngineLives(Routing):
    """The part of the fleet that starts and ends engines. The fleet sets what is only declared here."""

    config: ServiceConfig
    device: str
    folder: Path
    store: WeightStore
    pushes: Pushes
    pausing: Pausing
    key: str
    """what engines on other machines ask the front for"""
    threads: int
    reserved_cores: int

    def __init__(self) -> None:
        super().__init__()
        self.on_started: Callable[[int], None] = lambda index: None
        self.openai_schemas: dict[str, dict[str, Any]] = {}
        """schemas of the bodies of vLLM's own routes, by path"""
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._serves = False  # before it does, there are no pushes

    def make_engine(self) -> Member:
        """A new member, with the lowest free index, whose actor Ray makes as soon as it has room."""
        index = next(i for i in range(len(self.members) + 1) if all(member.index != i for member in self.members))
        cuda = self.device == "cuda"
        environment = engine_environment(self.device, self.threads, self.config.engine.dtype)
        options: dict[str, Any] = {
            "num_gpus": self.config.engine.tensor_parallel_size if cuda else 0,
            "num_cpus": 1 if cuda else self.reserved_cores,
            "scheduling_strategy": "SPREAD",  # so that a node that is lost takes few engines with it
            "max_restarts": -1,
            "max_concurrency": 4096,
            "runtime_env": {"env_vars": environment, **interpreter()},
        }
        fields, model, folder = self.config.for_engine(), str(self.folder.resolve()), str(self.store.folder.path)
        actor = ray.remote(Engine).options(**options).remote(fields, model, self.device, index, folder, self.key)
        member = Member(index, actor)
        self.members.append(member)
        self.members.sort(key=lambda member: member.index)
        return member

    async def start_engines(self, members: list[Member]) -> None:
        """Returns when all are in service; from then on they are watched. Raises FleetError when one cannot start."""
        try:
            await asyncio.gather(*(self.bring_into_service(member) for member in members))
        except (RayError, TimeoutError) as error:
            hint = "engine_logs = true shows its own log"
            raise FleetError(f"an engine could not start: {in_words(error)}; {hint}") from error
        self._serves = True
        for member in members:
            what = f"the watch of engine {member.index}"
            self._watches[member.index] = asyncio.create_task(kept_running(what, partial(self._watch, member)))

    async def end_engines(self, members: list[Member]) -> None:
        """End them for good, whatever they still run."""
        for member in members:
            if (watch := self._watches.pop(member.index, None)) is not None:
                watch.cancel()
            member.leave()
        stops = asyncio.gather(*(member.actor.stop.remote() for member in members), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stops, STOP_WITHIN)
        for member in members:
            ray.kill(member.actor, no_restart=True)
            await member.disconnect()

    async def bring_into_service(self, member: Member) -> None:
        """Start an engine whose actor is new, and let it load what is in service. Raises what Ray raises, and
        TimeoutError when it falls silent meanwhile."""
        started = await member.actor.start.remote(member.costs)
        member.costs, self.openai_schemas, member.node = started.costs, started.openai_schemas, started.node
        await member.connect(started.address, self.key)
        async with self.pushes.lock if self._serves else contextlib.nullcontext():  # not for the start, which is long
            files = [(of, await weights.file_for(member.node)) for of, weights in self.store.sets.items()]
            in_service = [(of, file) for of, file in files if file is not None]
            longest = sum(seconds_to_load(file) for _, file in in_service)
            async with asyncio.timeout(self.config.engine_timeout + longest):
                for of, file in in_service:
                    await member.actor.load.remote(file, of == "drafter")
                await self.pausing.catch_up(member)
            member.in_service = True
        if new := started.replaced.keys() - REPORTED:
            REPORTED.update(new)
            said = "%d functions of vLLM are replaced on this machine; `rollout-service patches` says which, and why"
            logger.warning(said, len(new))
        self.on_started(member.index)
        async with self._change:
            self._change.notify_all()

    async def _watch(self, member: Member) -> None:
        restarting = False
        while True:
            try:
                if member.in_service:
                    await asyncio.sleep(self._ask_every)
                    await self._hear(member)
                else:
                    if not restarting:
                        member.restarts += 1
                        await member.disconnect()
                        logger.warning("engine %d died; starting it again with the weights in service", member.index)
                    restarting = True
                    await self.bring_into_service(member)
                    restarting = False
                    logger.warning("engine %d is in service again", member.index)
            except TimeoutError:
                within = self.config.engine_timeout
                logger.error("engine %d did not answer within %.0f s; it is killed", member.index, within)
                member.leave()
                ray.kill(member.actor, no_restart=False)
            except RayError as error:
                if isinstance(error, RayTaskError) and not isinstance(error, NotStarted):
                    # The actor is alive, but cannot start or answer: a new actor tries again.
                    logger.error("engine %d: %s; starting it again", member.index, in_words(error))
                    ray.kill(member.actor, no_restart=False)
                elif not member.in_service:  # Ray is still making the new actor
                    await asyncio.sleep(AGAIN_AFTER)
                member.leave()

    @property
    def _ask_every(self) -> float:
        return min(ASK_EVERY, self.config.engine_timeout / 4)

    async def _hear(self, member: Member) -> None:
        """Ask an engine in service whether it is alive. Raises TimeoutError when it is silent, and what Ray raises when
        it has died. The time between two questions counts as silence."""
        asked, within = time.monotonic(), self.config.engine_timeout - self._ask_every
        answer = asyncio.ensure_future(member.actor.check.remote())
        try:
            while member.in_service and not answer.done():
                left = max(asked, member.heard) + member.patience + within - time.monotonic()
                if left <= 0.0:
                    raise TimeoutError
                await asyncio.wait({answer}, timeout=min(left, self._ask_every))
            if answer.done():
                answer.result()
        finally:
            answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
