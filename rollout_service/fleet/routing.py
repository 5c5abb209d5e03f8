"""Routing: gives each request to the engine with the least to do, and to another one if that engine dies.

A group goes to one engine. If that engine dies, another one generates the group again, and the client only waits
longer.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from rollout_service.engine.asgi import ResponseStart
from rollout_service.engine.engine import Aborted, NotStarted
from rollout_service.fleet.member import EnginesDied, FleetError, GroupFailed, Member, in_words
from rollout_service.protocol import Group, GroupRequest

logger = logging.getLogger("rollout_service")

ATTEMPTS = 3
"""times a group is generated before its client learns that its engines died"""
ENGINE_WITHIN = 300.0
"""seconds a request waits for an engine to come into service"""
ENGINE_LOST = (RayActorError, ActorDiedError, ActorUnavailableError, NotStarted)
"""NotStarted means that Ray made a new actor before the fleet noticed the death"""
LONGEST_REASON = 500
"""characters of the reason why an engine refused a group, because vLLM's messages may quote a whole prompt"""


class Routing:
    """The part of the fleet that requests meet. `members`: its engines, whether in service or not."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.wasted_tokens = 0
        """tokens of completions that were aborted by a cancellation, or by a weight update that generates them again"""
        self._counting: set[asyncio.Task[None]] = set()
        self._change = asyncio.Condition()  # notified when an engine comes into service

    async def _least_loaded(self) -> Member:
        async with self._change:
            try:
                async with asyncio.timeout(ENGINE_WITHIN):  # wait_for can lose the condition's lock to a cancellation
                    await self._change.wait_for(lambda: any(member.in_service for member in self.members))
            except TimeoutError:
                raise FleetError(f"no engine came into service within {ENGINE_WITHIN:.0f} s") from None
        return min((m for m in self.members if m.in_service), key=lambda m: m.load)

    async def generate(self, group: GroupRequest) -> Group:
        """The finished group. Cancelling aborts it in the engine. Raises GroupFailed when an engine refuses it,
        EnginesDied after ATTEMPTS deaths, and FleetError when no engine comes into service."""
        deaths = 0
        while deaths < ATTEMPTS:
            member = await self._least_loaded()
            key = f"group-{uuid.uuid4().hex}"
            member.add_load(group.n)
            call = asyncio.ensure_future(member.actor.generate.remote(group, key))
            try:
                outcome = await asyncio.shield(call)
                if isinstance(outcome, Group):
                    return outcome
                self.wasted_tokens += outcome.tokens  # a weight update aborted it: generate it again
            except asyncio.CancelledError:
                member.actor.abort.remote(key)
                self._count_what_it_leaves(call)
                raise
            except ENGINE_LOST:
                member.in_service = False
                deaths += 1
            except RayTaskError as error:
                raise GroupFailed(in_words(error)[:LONGEST_REASON]) from None
            except RayError as error:  # the answer is lost, whatever became of the engine
                logger.warning("engine %d: group %s: %s", member.index, group.id, in_words(error))
                deaths += 1
            finally:
                member.add_load(-group.n)
        raise EnginesDied(f"group {group.id or group.prompt_token_ids}: its engine died {ATTEMPTS} times in a row")

    def _count_what_it_leaves(self, call: "asyncio.Future[Group | Aborted]") -> None:
        async def count() -> None:
            with contextlib.suppress(RayError):
                outcome = await call
                if isinstance(outcome, Aborted):
                    self.wasted_tokens += outcome.tokens
                else:
                    self.wasted_tokens += sum(len(completion.token_ids) for completion in outcome.completions)

        task = asyncio.create_task(count())
        self._counting.add(task)
        task.add_done_callback(self._counting.discard)

    async def openai(self, method: str, path: str, headers: dict[str, str], body: bytes) -> AsyncIterator[Any]:
        """One request to vLLM's own routes in the least loaded engine: a ResponseStart, then pieces of the body.

        If an engine dies before the body begins, another one answers. Raises FleetError when it dies later, because
        what was sent cannot be taken back, and after ATTEMPTS deaths.
        """
        for _ in range(ATTEMPTS):
            member = await self._least_loaded()
            member.add_load(1)
            stream = member.actor.openai.options(num_returns="streaming").remote(method, path, headers, body)
            start: ResponseStart | None = None
            begun = False
            try:
                async for reference in stream:
                    part = await reference
                    if isinstance(part, ResponseStart):  # held back, so that another engine can still answer
                        start = part
                        continue
                    if not begun:
                        begun = True
                        yield start
                    yield part
                if not begun:
                    yield start
                return
            except ENGINE_LOST as error:
                member.in_service = False
                if begun:
                    raise FleetError(f"engine {member.index} died while it answered") from error
            finally:
                ray.cancel(stream)
                member.add_load(-1)
        raise FleetError(f"the engine that answered died {ATTEMPTS} times in a row")
