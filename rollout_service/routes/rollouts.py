"""POST /v1/rollouts: groups in, finished groups out, one a line, each as it finishes."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from rollout_service.fleet import Fleet
from rollout_service.member import FleetError
from rollout_service.protocol import ErrorBody, Group, GroupRequest, RolloutRequest
from rollout_service.telemetry import Telemetry

router = APIRouter(tags=["rollouts"])


@router.post("/v1/rollouts", response_model=Group, response_description="One group a line (application/x-ndjson)")
async def rollouts(request: Request, body: RolloutRequest) -> StreamingResponse:
    """Generate groups. The answer is a stream of lines, each a finished `Group`, in the order they finish.

    If the engines cannot finish, the last line is an `ErrorBody`. Disconnecting ends the generation.
    """
    # Tokenizing thousands of prompts takes a while: other requests go on meanwhile.
    groups = await asyncio.to_thread(request.app.state.admission.admit, body)
    lines = finished_groups(request.app.state.fleet, request.app.state.telemetry, groups)
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def finished_groups(fleet: Fleet, telemetry: Telemetry, groups: list[GroupRequest]) -> AsyncIterator[str]:
    tasks = [asyncio.create_task(fleet.generate(group)) for group in groups]
    telemetry.in_flight.inc(len(tasks))
    try:
        for finished in asyncio.as_completed(tasks):
            group = await finished
            telemetry.in_flight.dec()
            telemetry.finished(group)
            yield group.model_dump_json(exclude_none=True) + "\n"
        await fleet.check_acceptance()
    except FleetError as error:
        yield ErrorBody(error=str(error)).model_dump_json() + "\n"
    finally:  # the client has gone, or an engine could not finish: nothing goes on in the engines
        left = [task for task in tasks if not task.done()]
        for task in left:
            task.cancel()
        telemetry.in_flight.dec(len(left))
        await asyncio.gather(*left, return_exceptions=True)
