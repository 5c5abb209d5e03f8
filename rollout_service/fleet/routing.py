"""Routing: gives each request to the engine that placement.py chooses, and to another one if that engine dies.

A group goes to one engine. If that engine dies, another one generates the group again, and the client only waits
longer.
"""

import asyncio
import contextlib
import errno
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from rollout_service.engine.engine import Aborted, NotStarted
from rollout_service.fleet.engine_http import CONNECTION_LOST, Answer, EngineHttp
from rollout_service.fleet.member import EnginesDied, FleetError, GroupFailed, HungUp, LeftService, Member, in_words
from rollout_service.fleet.placement import Placement, tokens_of
from rollout_service.protocol import Group, GroupRequest

logger = logging.getLogger("rollout_service")

ATTEMPTS = 3
"""times a group is generated before its client learns that its engines died"""
ENGINE_WITHIN = 300.0
"""seconds a request waits for an engine to come into service"""
NO_ROOM = errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOTCONN
"""a process, or the machine, has as many open files as it may have; or too many connections wait to be accepted"""
ENGINE_LOST = (RayActorError, ActorDiedError, ActorUnavailableError, NotStarted, LeftService)
"""NotStarted means that Ray made a new actor before the fleet noticed the death"""
LONGEST_REASON = 500
"""characters of the reason why an engine refused a group, because vLLM's messages may quote a whole prompt"""


class Routing:
    """The part of the fleet that requests meet. `members`: its engines, whether in service or not."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.wasted_tokens = 0
        """tokens of completions that were aborted by a cancellation, or by a weight update that generates them again"""
        self.hung_up = False
        """whether the service stops"""
        self.placement = Placement()
        self._counting: set[asyncio.Task[None]] = set()
        self._change = asyncio.Condition()  # notified when an engine comes into service

    async def _engine_for(self, session: str | None, tokens: int) -> Member:
        if not self._open:
            await self._engine_in_service()
        return self.placement.choose(self._open, session, tokens)

    @property
    def _open(self) -> list[Member]:
        """The engines that take requests."""
        return [member for member in self.members if member.in_service and not member.draining]

    async def _engine_in_service(self) -> None:
        """Wait for an engine to come into service."""
        async with self._change:
            try:
                async with asyncio.timeout(ENGINE_WITHIN):  # wait_for can lose the condition's lock to a cancellation
                    await self._change.wait_for(lambda: self.hung_up or self._open)
            except TimeoutError:
                raise FleetError(f"no engine came into service within {ENGINE_WITHIN:.0f} s") from None
        if self.hung_up:
            raise HungUp("the service is stopping")

    async def generate(self, group: GroupRequest) -> Group:
        """The finished group. Cancelling aborts it in the engine. Raises GroupFailed when an engine refuses it,
        EnginesDied after ATTEMPTS deaths, and FleetError when no engine comes into service."""
        deaths, tokens = 0, tokens_of(group)
        while deaths < ATTEMPTS:
            member = await self._engine_for(group.session, tokens)
            key = f"group-{uuid.uuid4().hex}"
            member.add_load(group.n, tokens)
            call = asyncio.ensure_future(member.actor.generate.remote(group, key))
            try:
                outcome = await member.answer(call)
                if isinstance(outcome, Group):
                    return outcome
                self.wasted_tokens += outcome.tokens  # a weight update aborted it: generate it again
            except asyncio.CancelledError:
                member.actor.abort.remote(key)
                self._count_what_it_leaves(call)
                raise
            except LeftService:  # what it still answers is not delivered
                self._count_what_it_leaves(call)
                deaths += not member.draining
            except ENGINE_LOST:
                member.leave()
                deaths += 1
            except RayTaskError as error:
                raise GroupFailed(in_words(error)[:LONGEST_REASON]) from None
            except RayError as error:  # the answer is lost, whatever became of the engine
                logger.warning("engine %d: group %s: %s", member.index, group.id, in_words(error))
                deaths += 1
            finally:
                member.add_load(-group.n, -tokens)
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

    async def openai(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        session: str | None = None,
        tokens: int = 1,
    ) -> Answer:
        """The answer of vLLM's own routes. `tokens`: what the request may put in flight.

        If an engine dies before its answer has begun, another one answers. A stream that has begun ends with FleetError
        when its engine dies, because what was sent cannot be taken back. Raises FleetError after ATTEMPTS deaths, and
        HungUp after `hang_up`.
        """
        for _ in range(ATTEMPTS):
            member = await self._engine_for(session, tokens)
            connections = member.http
            assert connections is not None
            member.add_load(1, tokens)
            try:
                answer = await connections.ask(method, path, headers, body)
                if not isinstance(answer.body, bytes):
                    answer = await self._begun(member, connections, answer, tokens)
                    member.add_load(1, tokens)  # until the stream ends
                return answer
            except CONNECTION_LOST as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:  # of which the engine knows nothing
                    raise FleetError(f"the front cannot open another connection: {error.strerror}") from error
                self._lost(member, connections)
            finally:
                member.add_load(-1, -tokens)
        raise FleetError(f"the engine that answered died {ATTEMPTS} times in a row")

    async def _begun(self, member: Member, connections: EngineHttp, answer: Answer, tokens: int) -> Answer:
        """The stream, whose first piece has come. Raises CONNECTION_LOST if the engine dies before it."""
        stream = answer.body
        assert not isinstance(stream, bytes)
        first = await anext(stream, b"")

        async def body() -> AsyncGenerator[bytes, None]:
            try:
                async with aclosing(stream):
                    yield first
                    async for piece in stream:
                        yield piece
            except CONNECTION_LOST as error:
                self._lost(member, connections)
                raise FleetError(f"engine {member.index} died while it answered") from error
            finally:
                member.add_load(-1, -tokens)

        return answer._replace(body=body())

    def _lost(self, member: Member, connections: EngineHttp) -> None:
        """Raises HungUp if the connections were lost because this side has hung up."""
        if self.hung_up:
            raise HungUp("the service is stopping")
        if member.http is connections:  # and not those of the actor that took its place
            member.leave()

    async def hang_up(self) -> None:
        """End the requests to vLLM's routes, those that wait included, with HungUp."""
        async with self._change:
            self.hung_up = True
            self._change.notify_all()
        for member in self.members:
            await member.disconnect()
