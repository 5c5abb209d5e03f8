"""X-Request-Id: every request has an id, which every answer, every engine and every log line of the request has too."""

import logging
import uuid
from contextvars import ContextVar

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_service.http.errors import answer
from rollout_service.protocol import Problem

HEADER = b"x-request-id"
LONGEST = 128
"""characters"""
CURRENT: ContextVar[str | None] = ContextVar("request_id", default=None)
"""the id of the request that this task works for"""


class RequestIds:
    """ASGI middleware. It takes the client's id, or makes one. It refuses an id that is empty, too long, or not
    printable ASCII, because the id stands in headers and log lines.

    A made id is added to the request's headers, so that routes and engines see it like a given one.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        name_requests_in_log_lines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == HEADER), None)
        is_fine = given is not None and is_id(given)
        own = given if given is not None and is_fine else uuid.uuid4().hex.encode()
        if given is None:
            scope["headers"] = [*scope["headers"], (HEADER, own)]
        scope[KEY], scope[MADE] = own, given is None

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The engine's answer has the header already where vLLM echoes it.
                message["headers"] = [*(h for h in message.get("headers", ()) if h[0] != HEADER), (HEADER, own)]
            await send(message)

        token = CURRENT.set(own.decode())
        try:
            if given is not None and not is_fine:
                refusal = answer(Request(scope), 400, UNFIT, [Problem(field="X-Request-Id", message=UNFIT)])
                return await refusal(scope, receive, send_with_id)
            await self.app(scope, receive, send_with_id)
        finally:
            CURRENT.reset(token)


KEY = "rollout_service.request_id"
"""of the ASGI scope: the id, as bytes"""
MADE = "rollout_service.request_id_made"
"""of the ASGI scope: whether the client sent none"""
UNFIT = f"give an id of 1 to {LONGEST} printable ASCII characters, or leave the header out"


def is_id(given: bytes) -> bool:
    return 0 < len(given) <= LONGEST and given.isascii() and given.decode("ascii").isprintable()


def name_requests_in_log_lines() -> None:
    """Let the lines of the service's log end with the id of the request that they are about."""
    logging.getLogger("rollout_service").addFilter(with_request_id)  # adding it again changes nothing


def with_request_id(record: logging.LogRecord) -> bool:
    if (request := CURRENT.get()) is not None:
        record.msg, record.args = f"{record.getMessage()} (request {request})", None
    return True
