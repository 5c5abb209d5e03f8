"""POST /v1/weights/{policy|drafter}: a new version, as a safetensors stream or as a file in shared memory.

GET /v1/weights: the versions in service, and the runs that they belong to. DELETE /v1/weights: a run releases its own.
"""

import asyncio
import logging

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect

from rollout_service.fleet.fleet import Fleet
from rollout_service.http.admission import Refused
from rollout_service.http.errors import CLIENT_CLOSED_REQUEST
from rollout_service.http.json_route import JsonRoute
from rollout_service.protocol import (
    LONGEST_RUN,
    MAX_VERSION,
    Problem,
    SharedMemoryPush,
    WeightsOf,
    WeightsStatus,
    WeightStatus,
)
from rollout_service.transports import http_body, receiver, shared_memory

logger = logging.getLogger("rollout_service")
router = APIRouter(tags=["weights"], route_class=JsonRoute)

BODY = {"requestBody": {"required": True, "content": {
    http_body.CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}},
    shared_memory.CONTENT_TYPE: {"schema": SharedMemoryPush.model_json_schema()},
}}}  # fmt: skip


@router.get("/v1/weights")
async def weights(request: Request) -> WeightsStatus:
    """The versions that every engine holds, and how to push from this machine."""
    store = request.app.state.fleet.store
    drafter = store.sets.get("drafter")
    return WeightsStatus(
        policy=store.sets["policy"].status,
        drafter=drafter.status if drafter else None,
        dtype=store.sets["policy"].dtype,
        shared_memory=str(store.folder.path),
    )


@router.delete("/v1/weights")
async def release(request: Request, run: str = Query(min_length=1, max_length=LONGEST_RUN)) -> dict[str, int]:
    """Release a run's weights when the run ends: they stay in service, but belong to no run, so that any run may push.

    `released` is the number of weight sets that were released.
    """
    return {"released": await request.app.state.fleet.pushes.release(run)}


@router.post("/v1/weights/{of}", openapi_extra=BODY)
async def push(
    request: Request,
    of: WeightsOf,
    version: int = Query(ge=1, le=MAX_VERSION),
    checksum: str | None = Query(default=None, pattern="^[0-9a-f]{64}$"),
    run: str | None = Query(default=None, min_length=1, max_length=LONGEST_RUN),
    take_over: bool = False,
) -> WeightStatus:
    """Load new weights into every engine, in place. The answer comes when all hold them and the version is published.

    `checksum` is the sender's BLAKE3 of the safetensors bytes. Bytes with another checksum are refused. The service
    checks a body while it arrives; the engines check a file in shared memory when they read it, before they change
    anything.

    The body holds every tensor under its checkpoint name. If anything does not fit, the whole update is refused with a
    list of what is wrong.

    The version belongs to `run`. A push of another run, or of none, is answered with 409 until the run releases its
    weights, unless the push says `take_over`.
    """
    fleet: Fleet = request.app.state.fleet
    if of not in fleet.store.sets:
        message = f"the drafter {fleet.config.drafter.kind!r} has no weights of its own"
        raise Refused([Problem(field="of", message=message)], status=404)
    weights_set, way = fleet.store.sets[of], receiver(request.headers.get("content-type", ""), fleet.store.folder)
    weights_set.check_owner(run, take_over)  # before the body is received, and again before it is loaded
    try:
        update = await way.adopt(of, request.stream(), checksum, weights_set.largest_bytes)
    except ClientDisconnect:
        message = f"the push of {of} version {version} ended before all of it arrived; nothing has changed"
        logger.warning("%s", message)
        raise Refused([Problem(field="body", message=message)], status=CLIENT_CLOSED_REQUEST) from None
    # Shielded: a client that disconnects must not stop a push half-way through the engines.
    status = await asyncio.shield(asyncio.create_task(fleet.pushes.push(of, version, update, run, take_over)))
    if not status.skipped:
        request.app.state.telemetry.pushed(of, status)
    return status
