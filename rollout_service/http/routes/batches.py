"""POST /v1/prompts, /v1/batches/...: groups are generated in the background and handed out under leases."""

import asyncio
import contextlib
import time

from fastapi import APIRouter, Query, Request

from rollout_service.http.admission import Admission, Refused, stopping
from rollout_service.http.json_route import JsonRoute
from rollout_service.protocol import (
    Batch,
    BatchesStatus,
    LeaseExtension,
    LeaseGroups,
    LeaseRequest,
    LeaseStatus,
    Problem,
    PromptsRequest,
    PromptsStatus,
    RolloutRequest,
)
from rollout_service.queue.background import BackgroundGeneration
from rollout_service.queue.batch_queue import OtherRequest

router = APIRouter(tags=["batches"], route_class=JsonRoute)
ALL = LeaseGroups()


def background(request: Request) -> BackgroundGeneration:
    return request.app.state.background


@router.post("/v1/prompts")
async def prompts(request: Request, body: PromptsRequest) -> PromptsStatus:
    """Take groups to generate in the background. They are stored before the answer is sent.

    The answer is 429 with Retry-After when the queue is full, 507 when its disk is full, and 409 for an id that came
    before with another request. Then none of the groups was taken.
    """
    admission: Admission = request.app.state.admission
    names = [group.id for group in body.groups]
    problems = [
        Problem(field=f"groups.{i}.id", message="is needed; without it a group sent twice would be generated twice")
        for i, name in enumerate(names)
        if not name
    ]
    if problems:
        raise Refused(problems)
    groups = await asyncio.to_thread(admission.admit, RolloutRequest(groups=body.groups, model=body.model))
    try:
        status = background(request).queue.add(body, groups)
    except OtherRequest as error:
        message = "came before with another prompt, sampling or metadata; give the new group an id of its own"
        raise Refused(
            [Problem(field=f"groups.{i}.id", message=f"{names[i]!r} {message}") for i in error.positions], status=409
        ) from error
    background(request).wake.set()
    return status


@router.delete("/v1/prompts")
async def cancel(request: Request, run: str = Query()) -> dict[str, int]:
    """Forget a run's groups that are not acknowledged, wherever they are, and end the generation of those under way.

    `forgotten` is the number of these groups, and `ended` is how many of them were being generated.
    """
    forgotten, ended = background(request).cancel(run)
    return {"forgotten": forgotten, "ended": ended}


@router.post("/v1/batches/lease")
async def lease(request: Request, body: LeaseRequest) -> Batch:
    """Lease finished groups, none older than the bound. After the wait there may be fewer than asked for; `short` says
    why.

    The run's failed groups come under the same lease, which may hold only failed groups. After a failure the call still
    waits for the other groups of the run. When none of them is to come, it answers at once. A client that wants to
    learn of failures sooner asks for a shorter wait.
    """
    generation = background(request)
    deadline = time.monotonic() + body.wait
    version = max(generation.version, body.version or 0)
    while generation.queue.finished.should_wait(body, version) and (left := deadline - time.monotonic()) > 0:
        if request.app.state.stopping.is_set():
            raise stopping()
        generation.news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left, 1.0)):
                await generation.news.wait()
        if await request.is_disconnected():
            return Batch(lease=None, groups=[], version=version, short="the client disconnected")
        version = max(generation.version, version)
    batch = generation.queue.finished.lease(body, version)
    generation.wake.set()  # dropped groups are generated again
    return batch


@router.post("/v1/batches/{lease}/ack")
async def acknowledge(request: Request, lease: str, body: LeaseGroups = ALL) -> LeaseStatus:
    """Remove the lease's groups, or those named. They are never handed out again. 404 for a lease that is over."""
    return background(request).queue.finished.acknowledge(lease, body.groups)


@router.post("/v1/batches/{lease}/nack")
async def release(request: Request, lease: str, body: LeaseGroups = ALL) -> LeaseStatus:
    """Return the lease's groups, or those named, to the queue. 404 for a lease that is over."""
    status = background(request).queue.finished.release(lease, body.groups)
    background(request).news.set()
    return status


@router.post("/v1/batches/{lease}/extend")
async def extend(request: Request, lease: str, body: LeaseExtension) -> LeaseStatus:
    """Let the lease end this many seconds from now. 404 for a lease that is over."""
    return background(request).queue.finished.extend(lease, body.seconds)


@router.delete("/v1/batches")
async def release_run(request: Request, run: str = Query()) -> dict[str, int]:
    """Return all groups that a run has leased to the queue, at once, because its trainer starts again."""
    returned = background(request).queue.finished.release_run(run)
    background(request).news.set()
    return {"returned": returned}


@router.get("/v1/batches")
async def batches(request: Request) -> BatchesStatus:
    """How many groups are in which state, their ages, the leases, and what was generated in vain."""
    return background(request).status()
