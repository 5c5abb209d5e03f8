"""POST /v1/rollouts: groups in, finished groups out, one on each line, each as it finishes."""

import asyncio
import logging
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import FleetError
from rollout_service.http.json_route import JsonRoute
from rollout_service.protocol import ErrorBody, Group, GroupRequest, RolloutRequest
from rollout_service.telemetry import Telemetry

logger = logging.getLogger("rollout_service")
router = APIRouter(tags=["rollouts"], route_class=JsonRoute)
NDJSON = "application/x-ndjson"


class Lines(StreamingResponse):
    media_type = NDJSON


@router.post(
    "/v1/rollouts", response_class=Lines, response_model=Group | ErrorBody, response_description="One group a line"
)
async def rollouts(request: Request, body: RolloutRequest) -> Lines:
    """Generate groups. The answer is a stream of lines, each a finished `Group`, in the order in which they finish.

    In place of a group that fails, the line is an `ErrorBody` with the group's id. An `ErrorBody` without an id is the
    last line, and says that the service is stopping. Disconnecting ends the generation.
    """
    # In a thread, because tokenizing thousands of prompts takes a while and other requests must not wait for it.
    groups = await asyncio.to_thread(request.app.state.admission.admit, body)
    state = request.app.state
    lines = lines_of(state.fleet, state.telemetry, groups, state.stopping)
    return Lines(lines)


async def lines_of(
    fleet: Fleet, telemetry: Telemetry, groups: list[GroupRequest], stopping: asyncio.Event
) -> AsyncIterator[str]:
    """A line for each group when it ends: the group, or an ErrorBody with its id. Closing ends the generation."""
    lines: asyncio.Queue[str | None] = asyncio.Queue()

    async def generate(group: GroupRequest) -> None:
        with telemetry.in_flight.track_inprogress():
            lines.put_nowait(await line_of(fleet, telemetry, group))

    async def stop() -> None:
        await stopping.wait()
        lines.put_nowait(None)

    tasks = [asyncio.create_task(generate(group)) for group in groups]
    watching = asyncio.create_task(stop())
    try:
        for i in range(len(groups)):
            line = await lines.get()
            if line is None:
                error = ErrorBody(error=f"the service is stopping: {len(groups) - i} groups are not finished")
                yield error.model_dump_json(exclude_none=True) + "\n"
                return
            yield line
        await fleet.check_acceptance()
    finally:  # when the client has gone or the service stops, nothing goes on in the engines
        for task in (watching, *tasks):
            task.cancel()
        await asyncio.gather(watching, *tasks, return_exceptions=True)


async def line_of(fleet: Fleet, telemetry: Telemetry, group: GroupRequest) -> str:
    try:
        finished = await fleet.generate(group)
    except FleetError as error:
        return ErrorBody(error=str(error), group=group.id).model_dump_json(exclude_none=True) + "\n"
    except Exception as error:
        logger.exception("group %s could not be generated", group.id)
        message = f"the service failed: {type(error).__name__}; its log has the cause"
        return ErrorBody(error=message, group=group.id).model_dump_json(exclude_none=True) + "\n"
    telemetry.finished(finished)
    return finished.model_dump_json(exclude_none=True) + "\n"
