"""POST /v1/completions, POST /v1/chat/completions: vLLM's own handlers, in the least loaded engine. GET /v1/models is
answered here, also while no engine is in service."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from ray.exceptions import RayTaskError

from rollout_service.member import FleetError, in_words

from rollout_service.json_route import JsonRoute, read_object

router = APIRouter(tags=["OpenAI-compatible (vLLM's own handlers)"], route_class=JsonRoute)

PASSED_ON = ("content-type", "accept", "x-request-id")
SAMPLING_HEADER = "x-sampling"
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""the service's own, whatever the checkpoint's generation_config says; echoed with what the request gave"""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before its answer"""
DROPPED = ("content-length", "transfer-encoding", "connection")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The served policy, as vLLM describes it."""
    config = request.app.state.fleet.config
    model = {
        "id": config.served_name, "object": "model", "created": int(time.time()), "owned_by": "vllm",
        "root": config.served_name, "parent": None, "max_model_len": config.context_limit,
    }  # fmt: skip
    return {"object": "list", "data": [model]}


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """As vLLM's route of this name, with all its extra fields; what speculation cannot keep lossless is refused."""
    return await generation(request)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """As vLLM's route of this name, with all its extra fields; what speculation cannot keep lossless is refused."""
    return await generation(request)


async def generation(request: Request) -> Response:
    body = await request.body()
    fields = read_object(request, body)
    request.app.state.admission.check_openai(request.url.path, fields)
    response = await through_an_engine(request, body)
    if response.status_code == 200:  # vLLM has checked them
        given = {name: fields[name] for name in DEFAULTS if fields.get(name) is not None}
        response.headers[SAMPLING_HEADER] = json.dumps(DEFAULTS | given)
    return response


async def through_an_engine(request: Request, body: bytes) -> Response:
    """The answer of an engine: whole, or a stream whose errors are events of its own. Raises FleetError, and
    HTTPException when the engine has no answer at all."""
    headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
    parts: AsyncIterator[Any] = request.app.state.fleet.openai(request.method, request.url.path, headers, body)
    first, gone = asyncio.ensure_future(anext(parts)), asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():  # nobody is left to answer: the engine stops generating
            first.cancel()
            await asyncio.wait({first})
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        gone.cancel()
    try:
        start = first.result()
    except RayTaskError as error:
        raise HTTPException(500, f"the engine could not answer: {in_words(error)}") from error
    kept = {name.lower(): value for name, value in start.headers if name.lower() not in DROPPED}
    if kept.get("content-type", "").startswith("text/event-stream"):
        parts = with_error_event(parts)
    return StreamingResponse(parts, status_code=start.status, headers=kept)


async def with_error_event(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The parts of an event stream, and where they break off an event that says why, in the form of vLLM's own."""
    try:
        async for part in parts:
            yield part
    except (FleetError, RayTaskError) as failure:
        error = {"message": in_words(failure), "type": "InternalServerError", "param": None, "code": 500}
        yield b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


async def disconnected(request: Request) -> None:
    """Return when the client has gone. The body has been read: what comes next is the disconnection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
