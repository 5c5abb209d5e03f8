"""POST /v1/completions, POST /v1/chat/completions: vLLM's own handlers, in the engine that the fleet chooses."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rollout_service.fleet.engine_http import Answer
from rollout_service.fleet.member import FleetError, HungUp, in_words
from rollout_service.http.admission import stopping
from rollout_service.http.errors import CLIENT_CLOSED_REQUEST, openai_error
from rollout_service.http.json_route import JsonRoute, read_object
from rollout_service.http.request_id import MADE
from rollout_service.http.request_tokens import tokens_in_flight
from rollout_service.protocol import Problem

router = APIRouter(tags=["OpenAI-compatible (vLLM's own handlers)"], route_class=JsonRoute)

PASSED_ON = ("content-type", "accept", "x-request-id")
SAMPLING_HEADER = "x-sampling"
SESSION_HEADER = "x-session-id"
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


async def generation(request: Request, params: str | None = None) -> Response:
    """An engine's answer. Its header says how it was sampled, which the body's field `params` asks for, or the body
    itself."""
    response, fields = await passed_on(request)
    if response.status_code == 200:  # vLLM has checked the fields
        asked = fields if params is None else fields[params]
        given = {name: asked[name] for name in DEFAULTS if asked.get(name) is not None}
        response.headers[SAMPLING_HEADER] = json.dumps(DEFAULTS | given)
    return response


async def passed_on(request: Request) -> tuple[Response, dict[str, Any]]:
    """An engine's answer, and the fields of the request's body."""
    body = await request.body()
    fields = read_object(request, body)
    path, admission, fleet = request.url.path, request.app.state.admission, request.app.state.fleet
    admission.check_openai(path, fields)
    headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
    if fields.get("request_id") and request.scope.get(MADE):  # vLLM would prefer the header to the client's own id
        headers.pop("x-request-id", None)
    session = request.headers.get(SESSION_HEADER)
    tokens = tokens_in_flight(path, fields, body, admission.max_tokens)
    try:
        async with while_connected(request.receive):
            answer: Answer = await fleet.openai(request.method, path, headers, body, session, tokens)
    except TimeoutError:
        return Response(status_code=CLIENT_CLOSED_REQUEST), fields
    except HungUp:
        raise stopping() from None
    kept = {name: value for name, value in answer.headers.items() if name not in DROPPED}
    if not isinstance(answer.body, bytes):
        return EventStream(answer.status, kept, answer.body), fields
    if answer.status == 400 and NOTHING_LEFT in answer.body and fields.get("max_tokens") != 0:
        return prompt_too_long(admission.max_tokens), fields
    return Response(answer.body, answer.status, kept), fields


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncGenerator[None, None]:
    """A context that is cancelled, and raises TimeoutError, when the client leaves. Its request has been read."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        limit.reschedule(0)

    async with asyncio.timeout(None) as limit:
        gone = asyncio.create_task(disconnected())
        try:
            yield
        finally:
            gone.cancel()


def prompt_too_long(limit: int) -> Response:
    """The refusal of a prompt that fills the context, in words: vLLM's own says only that max_tokens is 0."""
    message = f"has {limit} tokens, too many: prompt and response together may have {limit}"
    return JSONResponse(openai_error(400, message, [Problem(field="prompt", message=message)]), 400)


class EventStream(Response):
    """The events of an engine as they come. If they break off, a last event says why, in the form of vLLM's own."""

    def __init__(self, status: int, headers: dict[str, str], events: AsyncGenerator[bytes, None]):
        self.status_code, self.events, self.background = status, events, None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self.events), while_connected(receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                try:
                    async for event in self.events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                except FleetError as failure:
                    await send({"type": "http.response.body", "body": error_event(failure), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:  # the client has gone
            return


def error_event(failure: FleetError) -> bytes:
    error = openai_error(503, str(failure)) if isinstance(failure, HungUp) else openai_error(500, in_words(failure))
    return b"data: " + json.dumps(error).encode() + b"\n\n"
