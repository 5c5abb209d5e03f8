"""Controls: what the control routes ask of engines (engine/control.py), put together for the fleet."""

import asyncio
import contextlib
from typing import Any

from ray.exceptions import RayError

from rollout_service.fleet.member import FleetError, LeftService, Member, in_words
from rollout_service.fleet.routing import ENGINE_LOST

MOVE_WEIGHTS = {"weight_checksums", "sleep", "wake_up"}
"""controls that read or move all weights, while the engine's core process answers nothing else"""
LONGEST = 600.0
"""seconds that such a control may take beyond `engine_timeout`"""


class Controls:
    def __init__(self, members: list[Member]):
        self.members = members

    async def abort_requests(self, request_ids: list[str] | None) -> int:
        """End the requests of these ids, or all. Returns their number. Groups among them are generated again."""
        ended = await self.of_each("abort_requests", request_ids)
        return len(request_ids) if request_ids is not None else sum(ended.values())

    async def reset_prefix_cache(self, running_requests: bool, external: bool) -> bool:
        """Whether every engine's cache is empty now."""
        return all((await self.of_each("reset_prefix_cache", running_requests, external)).values())

    async def server_info(self, config_format: str) -> dict[str, Any]:
        """As an engine gives it. Raises FleetError when none is in service."""
        for member in self.members:
            if member.in_service:
                with contextlib.suppress(*ENGINE_LOST):
                    return await member.answer(member.actor.control.remote("server_info", config_format))
        raise FleetError("no engine is in service; try again")

    async def weight_checksums(self) -> dict[str, str]:
        """Checksums of the policy, which every engine in service has. Raises FleetError when they differ between
        engines."""
        by_engine = await self.of_each("weight_checksums")
        if not by_engine:
            raise FleetError("no engine is in service; try again")
        first, *others = by_engine.values()
        if differ := sorted({name for other in others for name, _ in first.items() ^ other.items()}):
            shown = ", ".join(differ[:3])
            raise FleetError(
                f"engines hold different weights in {len(differ)} tensors ({shown}, ...), as after an update that some "
                "of them have not loaded yet; ask again, and push again if it stays"
            )
        return first

    async def of_the_first(self, what: str, *arguments: Any) -> Any:
        """What the first engine answers to a control. Raises what Ray raises, and FleetError without an engine."""
        if not self.members:
            raise FleetError("there is no engine; try again when a node has joined")
        member = self.members[0]
        with member.busy(LONGEST):
            return await member.actor.control.remote(what, *arguments)

    async def of_each(self, what: str, *arguments: Any) -> dict[int, Any]:
        """What each engine in service answers to a control, by its index. An engine that does not answer is left out.
        It is out of service until it has started again, even if it lives, because it may have missed a pause. Raises
        FleetError when an engine refuses."""

        async def ask(member: Member) -> None:
            try:
                with member.busy(LONGEST if what in MOVE_WEIGHTS else 0.0):
                    answers[member.index] = await member.answer(member.actor.control.remote(what, *arguments))
            except LeftService:
                pass
            except ENGINE_LOST:
                member.leave()

        answers: dict[int, Any] = {}
        try:
            await asyncio.gather(*(ask(member) for member in self.members if member.in_service))
        except RayError as error:
            raise FleetError(f"an engine could not {what}: {in_words(error)}") from error
        return dict(sorted(answers.items()))
