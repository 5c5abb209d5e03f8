"""Scaling: engines are added and taken away while the fleet serves.

- Before an engine is added, there must be room for it. It comes into service with the weights in service.
- An engine that is taken away takes no new requests. What it runs has some seconds to end, and its groups are then
  generated elsewhere. It ends between two pushes.
- With "all", there are as many engines as fit. One is added when a node joins, and taken away when its node leaves.
- One change at a time: another one that is asked for meanwhile is refused.
"""

import asyncio
import logging
import time

import ray

from rollout_service.config import Engines
from rollout_service.fleet.engine_lives import EngineLives
from rollout_service.fleet.kept_running import kept_running
from rollout_service.fleet.member import FleetError, Member
from rollout_service.fleet.resources import check_room_for_more, engines_that_fit_now
from rollout_service.protocol import EngineState, EngineStatus, FleetStatus
from rollout_service.transports.transport import refused

logger = logging.getLogger("rollout_service")

LOOK_EVERY = 5.0
"""seconds between two looks at the nodes, with "all" """
DRAINED_EVERY = 0.1
"""seconds between two looks at an engine that is taken away"""


class Scaling:
    """Use: `await fleet.scaling.to(4, drain=60.0)`."""

    def __init__(self, fleet: EngineLives):
        self.fleet = fleet
        self.wanted: Engines = fleet.config.engines
        self._what = fleet.config, fleet.device, fleet.reserved_cores
        self._changing = asyncio.Lock()
        self._fitted = 0  # engines that would have fitted at the last look
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._following = asyncio.create_task(kept_running("the watch of the nodes", self._follow))

    def stop(self) -> None:
        if self._following is not None:
            self._following.cancel()

    async def to(self, wanted: Engines, drain: float) -> None:
        """Returns when that many engines are in service and the others have ended. `drain`: seconds that running
        requests of an engine have. Raises RefusedUpdate when another change is under way or there is no room, and
        FleetError when an engine cannot start; the engines are then what they were."""
        if self._changing.locked():
            message = "the number of engines is being changed already; wait for the answer to that request"
            raise refused("engines", message, status=409)
        async with self._changing:
            if wanted == "all":
                await self._add(await asyncio.to_thread(self.fit))
            elif (more := wanted - len(self.fleet.members)) > 0:
                try:
                    await check_room_for_more(*self._what, running=len(self.fleet.members), more=more)
                except FleetError as error:
                    raise refused("engines", str(error), status=409) from None
                await self._add(more)
            elif more < 0:
                await self._take_away(self._least_missed(-more), drain)
            self.wanted = wanted

    def status(self) -> FleetStatus:
        return FleetStatus(wanted=self.wanted, engines=[_status(member) for member in self.fleet.members])

    def fit(self) -> int:
        """The number of further engines that there is room for."""
        return engines_that_fit_now(*self._what)

    async def _add(self, count: int) -> None:
        added = [self.fleet.make_engine() for _ in range(count)]
        for member in added:
            member.joining = True
        try:
            await self.fleet.start_engines(added)
        except BaseException:
            await self._end(added)
            raise
        for member in added:
            member.joining = False
            logger.warning("engine %d was added", member.index)

    def _least_missed(self, count: int) -> list[Member]:
        """Those out of service, then the newest: a trainer's transfer is connected to the first engine."""
        return sorted(self.fleet.members, key=lambda member: (member.in_service, -member.index))[:count]

    async def _take_away(self, members: list[Member], drain: float) -> None:
        deadline = time.monotonic() + drain
        for member in members:
            member.draining = True
        while any(member.in_service and member.load for member in members) and time.monotonic() < deadline:
            await asyncio.sleep(DRAINED_EVERY)
        async with self.fleet.pushes.lock:
            await self._end(members)

    async def _end(self, members: list[Member]) -> None:
        for member in members:
            self.fleet.members.remove(member)
        await self.fleet.end_engines(members)
        for member in members:
            logger.warning("engine %d was taken away", member.index)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if self.wanted == "all" and not self._changing.locked():
                async with self._changing:
                    await self._follow_nodes()

    async def _follow_nodes(self) -> None:
        nodes, fitted = await asyncio.to_thread(lambda: (ray.nodes(), self.fit()))
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        members = self.fleet.members
        if left := [member for member in members if not member.in_service and member.node not in alive]:
            await self._end(left)
        elif all(member.in_service for member in members) and (more := min(fitted, self._fitted)):
            # Two looks, because an engine that starts again may not have taken its room yet at the first one.
            fitted = 0
            try:
                await self._add(more)
            except FleetError as error:
                logger.error("%s; it is tried again", error)
        self._fitted = fitted


def _status(member: Member) -> EngineStatus:
    state: EngineState = "in service" if member.in_service else "starting"
    return EngineStatus(
        index=member.index,
        state="draining" if member.draining else state,
        requests=member.load,
        tokens_in_flight=member.tokens,
        restarts=member.restarts,
        node=member.node,
    )
