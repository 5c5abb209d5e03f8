"""POST /pause, /resume, /sleep, /wake_up, /abort_requests, /reset_prefix_cache: vLLM's routes, over the whole fleet."""

import asyncio
from collections.abc import Awaitable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request, Response

from rollout_service.engine.pausing import PauseMode
from rollout_service.fleet.fleet import Fleet
from rollout_service.http.control_route import ControlRoute
from rollout_service.protocol import (
    AbortById,
    AbortedRequests,
    AbortRequests,
    Awake,
    CacheReset,
    IsPaused,
    IsSleeping,
    Paused,
    Sleeping,
    Tags,
)

T = TypeVar("T")
router = APIRouter(tags=["control"], route_class=ControlRoute)


def fleet_of(request: Request) -> Fleet:
    return request.app.state.fleet


async def to_its_end(work: Awaitable[T]) -> T:
    """What `work` returns. A client that disconnects does not stop it half-way through the engines."""
    return await asyncio.shield(asyncio.ensure_future(work))


@router.post("/pause")
async def pause(request: Request, mode: PauseMode = "abort", clear_cache: bool = True) -> Paused:
    """Pause every engine until `/resume`. The answer comes when none generates any more.

    `abort` ends running completions: groups are generated again, requests to OpenAI's routes end with the finish reason
    `abort`. `wait` lets them finish first. `keep` freezes them. What comes later waits.

    With `clear_cache`, frozen completions compute their keys and values again when they go on. Weights can be pushed in
    a pause, and it lasts on. An engine that restarts takes the pause before it serves.
    """
    await to_its_end(fleet_of(request).pausing.pause(mode, clear_cache))
    return Paused(status="paused")


@router.post("/resume")
async def resume(request: Request) -> Paused:
    """End the pause. Nothing happens if there is none."""
    await to_its_end(fleet_of(request).pausing.resume())
    return Paused(status="resumed")


@router.get("/is_paused")
async def is_paused(request: Request) -> IsPaused:
    """Whether a client has paused the service."""
    return IsPaused(is_paused=fleet_of(request).pausing.paused)


@router.post("/abort_requests")
async def abort_requests(request: Request, body: AbortRequests | None = None) -> AbortedRequests:
    """End requests without a pause, by their ids or all. Groups are generated again."""
    ids = body.request_ids if body is not None else None
    return AbortedRequests(aborted=await fleet_of(request).controls.abort_requests(ids or None))


@router.post("/inference/v1/abort_requests", response_class=Response)
async def abort_by_id(request: Request, body: AbortById) -> Response:
    """End requests by their ids. The answer has no body."""
    await fleet_of(request).controls.abort_requests(body.request_ids)
    return Response(status_code=200)


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(
    request: Request, reset_running_requests: bool = False, reset_external: bool = False
) -> CacheReset:
    """Empty every engine's cache of prompts. It fails while completions hold some of it, unless
    `reset_running_requests` lets them compute it again."""
    success = await fleet_of(request).controls.reset_prefix_cache(reset_running_requests, reset_external)
    return CacheReset(success=success)


@router.post("/sleep")
async def sleep(
    request: Request,
    level: Annotated[int, Query(ge=0, le=2)] = 1,
    mode: PauseMode = "abort",
    tags: Annotated[list[Tags] | None, Query()] = None,
) -> Sleeping:
    """Pause every engine until `/wake_up`, and free GPU memory at levels 1 and 2.

    The weights move to host memory at both levels, so that every engine has the right ones when it wakes. On a CPU the
    engines only pause. `tags` is ignored, as by vLLM.
    """
    pausing = fleet_of(request).pausing
    if level == 0:
        await to_its_end(pausing.pause(mode, False))
    else:
        await to_its_end(pausing.sleep(mode))
    return Sleeping(level=level, memory="freed" if level > 0 and pausing.frees_memory else "kept")


@router.post("/wake_up")
async def wake_up(request: Request, tags: Annotated[list[Tags] | None, Query()] = None) -> Awake:
    """Take back the memory of `tags`, or all of it. The engines resume once all of it is back."""
    awake = await to_its_end(fleet_of(request).pausing.wake_up(tags))
    return Awake(status="awake" if awake else "sleeping", tags=tags)


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> IsSleeping:
    """Whether the engines sleep or are paused."""
    return IsSleeping(is_sleeping=fleet_of(request).pausing.paused)
