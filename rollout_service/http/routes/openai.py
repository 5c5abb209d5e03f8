"""POST /v1/completions, POST /v1/chat/completions: vLLM's own handlers, in the least loaded engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import RayTaskError

from rollout_service.fleet.member import FleetError, in_words
from rollout_service.http.admission import Refused, stopping
from rollout_service.http.errors import CLIENT_CLOSED_REQUEST, openai_error
from rollout_service.http.json_route import JsonRoute, read_object
from rollout_service.protocol import Problem

router = APIRouter(tags=["OpenAI-compatible (vLLM's own handlers)"], route_class=JsonRoute)

PASSED_ON = ("content-type", "accept", "x-request-id")
SAMPLING_HEADER = "x-sampling"
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""the service's own, whatever the checkpoint's generation_config says; the answer's header has what was used"""
NOTHING_LEFT = b"max_tokens must be at least 1, got 0"
DROPPED = ("content-length", "transfer-encoding", "connection")


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """vLLM's route of this name, with all its extra fields."""
    return await generation(request)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """vLLM's route of this name, with all its extra fields."""
    return await generation(request)


async def generation(request: Request) -> Response:
    body = await request.body()
    fields = read_object(request, body)
    admission = request.app.state.admission
    admission.check_openai(request.url.path, fields)
    response = await through_an_engine(request, body)
    if isinstance(response, StreamingResponse) and response.status_code == 400 and fields.get("max_tokens") != 0:
        response = await explained(response, admission.max_tokens)
    if response.status_code == 200:  # vLLM has checked the fields
        given = {name: fields[name] for name in DEFAULTS if fields.get(name) is not None}
        response.headers[SAMPLING_HEADER] = json.dumps(DEFAULTS | given)
    return response


async def through_an_engine(request: Request, body: bytes) -> Response:
    """The answer of an engine: whole, or a stream in which errors are events. Raises FleetError. Raises Refused when
    the service stops before there is an answer, and HTTPException when the engine cannot answer."""
    headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
    parts: AsyncIterator[Any] = request.app.state.fleet.openai(request.method, request.url.path, headers, body)
    first, gone = asyncio.ensure_future(anext(parts)), asyncio.create_task(disconnected(request))
    stop = asyncio.create_task(request.app.state.stopping.wait())
    try:
        await asyncio.wait({first, gone, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():  # the client has gone or the service stops, so the engine stops generating
            first.cancel()
            await asyncio.wait({first})
            if stop.done():
                raise stopping()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        gone.cancel()
        stop.cancel()
    try:
        start = first.result()
    except RayTaskError as error:
        raise HTTPException(500, f"the engine could not answer: {in_words(error)}") from error
    kept = {name.lower(): value for name, value in start.headers if name.lower() not in DROPPED}
    if kept.get("content-type", "").startswith("text/event-stream"):
        parts = with_error_event(parts, request.app.state.stopping)
    return StreamingResponse(parts, status_code=start.status, headers=kept)


async def explained(refusal: StreamingResponse, limit: int) -> Response:
    """The refusal of a prompt that fills the context, in words: vLLM's own says only that max_tokens is 0."""
    body = b"".join([part async for part in refusal.body_iterator])  # type: ignore[misc]
    if NOTHING_LEFT in body:
        message = f"has {limit} tokens, too many: prompt and response together may have {limit}"
        return JSONResponse(openai_error(400, message, [Problem(field="prompt", message=message)]), 400)
    return Response(body, 400, {name: value for name, value in refusal.headers.items() if name not in DROPPED})


async def with_error_event(parts: AsyncIterator[bytes], is_stopping: asyncio.Event) -> AsyncIterator[bytes]:
    """The parts of an event stream. If it breaks off, a last event says why, in the form of vLLM's own."""
    try:
        async for part in until(is_stopping, parts):
            yield part
    except (FleetError, RayTaskError, Refused) as failure:
        status = failure.status if isinstance(failure, Refused) else 500
        error = openai_error(status, str(failure) if status == 503 else in_words(failure))
        yield b"data: " + json.dumps(error).encode() + b"\n\n"


async def until(is_stopping: asyncio.Event, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The parts, until the service is told to stop. Then it raises Refused."""
    stop = asyncio.create_task(is_stopping.wait())
    try:
        while True:
            part = asyncio.ensure_future(anext(parts, None))
            try:
                await asyncio.wait({part, stop}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not part.done():
                    part.cancel()
                    await asyncio.wait({part})
            if part.cancelled():
                raise stopping()
            if (piece := part.result()) is None:
                return
            yield piece
    finally:
        stop.cancel()


async def disconnected(request: Request) -> None:
    """Return when the client has gone. The body has been read, so only the disconnection can follow."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
