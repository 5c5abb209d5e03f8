"""POST /v1/prompts, /v1/batches/...: groups generated in the background, and finished ones out under leases."""

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
    """Take groups to generate in the background; they are kept before the answer.

    429 with Retry-After when the queue is full, 507 when its disk is, 409 for an id that came before with another
    request: then none of them was taken.
    """
    admission: Admission = request.app.state.admission
    names = [group.id for group in body.groups]
    problems = [
        Problem(field=f"groups.{i}.id", message="is needed: without it a group sent again would be generated twice")
        for i, name in enumerate(names)
        if not name
    ]
    if problems:
        raise Refused(problems)
    groups = await asyncio.to_thread(admission.admit, RolloutRequest(groups=body.groups, model=body.model))
    try:
        status = background(request).queue.add(body, groups)
    except OtherRequest as error:
        message = "came before with another prompt, sampling or metadata: give what is new an id of its own"
        raise Refused(
            [Problem(field=f"groups.{i}.id", message=f"{names[i]!r} {message}") for i in error.positions], status=409
        ) from error
    background(request).wake.set()
    return status


@router.delete("/v1/prompts")
async def cancel(request: Request, run: str = Query()) -> dict[str, int]:
    """Forget a run's groups that are not acknowledged, wherever they are; generation of those under way is ended.

    `forgotten` is their number, and `ended` the number of those of them that were being generated.
    """
    forgotten, ended = background(request).cancel(run)
    return {"forgotten": forgotten, "ended": ended}


@router.post("/v1/batches/lease")
async def lease(request: Request, body: LeaseRequest) -> Batch:
    """Finished groups, none older than the bound, under a lease; fewer than asked for after the wait, and why.

    The run's failed groups come under the same lease, which may hold them alone. They do not cut a batch short: they
    end the wait once nothing of the run is to come any more. Who wants to learn of them sooner gives a shorter wait.
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
            return Batch(lease=None, groups=[], version=version, short="the client has gone")
        version = max(generation.version, version)
    batch = generation.queue.finished.lease(body, version)
    generation.wake.set()  # what was dropped is generated again
    return batch


@router.post("/v1/batches/{lease}/ack")
async def acknowledge(request: Request, lease: str, body: LeaseGroups = ALL) -> LeaseStatus:
    """Remove the lease's groups, or those named: they are never handed out again. 404 for a lease that is over."""
    return background(request).queue.finished.acknowledge(lease, body.groups)


@router.post("/v1/batches/{lease}/nack")
async def release(request: Request, lease: str, body: LeaseGroups = ALL) -> LeaseStatus:
    """Return the lease's groups, or those named, to the queue. 404 for a lease that is over."""
    status = background(request).queue.finished.release(lease, body.groups)
    background(request).news.set()
    return status


@router.post("/v1/batches/{lease}/extend")
async def extend(request: Request, lease: str, body: LeaseExtension) -> LeaseStatus:
    """Let the lease end so many seconds from now. 404 for a lease that is over."""
    return background(request).queue.finished.extend(lease, body.seconds)


@router.delete("/v1/batches")
async def release_run(request: Request, run: str = Query()) -> dict[str, int]:
    """Return all that a run has leased to the queue, at once: for a trainer that begins anew."""
    returned = background(request).queue.finished.release_run(run)
    background(request).news.set()
    return {"returned": returned}


@router.get("/v1/batches")
async def batches(request: Request) -> BatchesStatus:
    """Groups by where they are, ages, leases, and what was generated in vain."""
    return background(request).status()
