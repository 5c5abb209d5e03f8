"""Guard of every request: its token, the size of its body, and the time that it may take to arrive.

It is plain ASGI, so that a disconnection reaches a route that streams.
"""

import asyncio
import secrets
import time
from typing import Any

from fastapi import Request
from starlette.types import Message, Receive, Scope, Send

from rollout_service.http.admission import Refused, stopping
from rollout_service.http.errors import answer
from rollout_service.protocol import INTERFACE_VERSION, VERSION_HEADER, Problem

IDLE = 60.0
"""seconds that a body may take to arrive, in addition to the time that its size takes at SLOWEST"""
SLOWEST = 1 << 20
"""bytes a second"""
WEIGHTS = "/v1/weights/"


class Guard:
    """ASGI middleware. It checks the bearer token on all routes except /health, and the client's version of the
    interface. It reads each body whole, within limits, before a route sees it. Only pushed weights go on to their route
    as they arrive, because that route limits them by the size of the tensors."""

    def __init__(self, app: Any, token: str | None, body_limit: int, stopping: asyncio.Event):
        self.app, self.token, self.body_limit, self.stopping = app, token, body_limit, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, receive = Request(scope), Paced(receive)
        try:
            self.check(request)
            if not request.url.path.startswith(WEIGHTS):
                receive = Replayed(await self.body(request, receive), receive)
        except Refused as error:
            refusal = answer(request, error.status, str(error), error.problems)
            return await refusal(scope, receive, send)
        except Gone:
            return None
        if request.method == "HEAD":  # the server leaves out the body
            scope = dict(scope) | {"method": "GET"}
        return await self.app(scope, receive, send)

    def check(self, request: Request) -> None:
        """Raises Refused for a request that is wrong whatever its body holds."""
        if self.token is not None and request.url.path != "/health":
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), self.token.encode()):
                message = "this service asks for its token; send the header Authorization: Bearer <token>"
                raise Refused([Problem(field="Authorization", message=message)], status=401)
        client = request.headers.get(VERSION_HEADER, str(INTERFACE_VERSION))
        if client != str(INTERFACE_VERSION):
            versions = f"the client has version {client} of the interface, and this service version {INTERFACE_VERSION}"
            message = f"{versions}; install the same release of rollout-service on both sides"
            raise Refused([Problem(field=VERSION_HEADER, message=message)])
        if self.stopping.is_set():
            raise stopping()

    async def body(self, request: Request, receive: Receive) -> bytes:
        """The whole body. Raises Refused (413) when it is too large, by its header or as it arrives. Raises Gone when
        the client leaves."""
        length = request.headers.get("content-length", "0")
        if int(length) > self.body_limit:
            raise self._too_large(length)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            if len(body) > self.body_limit:
                raise self._too_large(f"more than {self.body_limit}")
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self, size: str) -> Refused:
        message = f"the request's body is too large: {size} bytes; the limit is {self.body_limit} (body_limit_mib)"
        return Refused([Problem(field="body", message=message)], status=413)


class Gone(Exception):
    """The client left before its request had arrived."""


class Paced:
    """A `receive` that raises Refused (408) when a body arrives more slowly than IDLE and SLOWEST allow."""

    def __init__(self, receive: Receive):
        self.receive, self.began, self.received, self.arrived = receive, time.monotonic(), 0, False

    async def __call__(self) -> Message:
        if self.arrived:  # only the disconnection can follow, at any time
            return await self.receive()
        ends = self.began + IDLE + self.received / SLOWEST
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                message = await self.receive()
        except TimeoutError:
            seconds = time.monotonic() - self.began
            text = f"the request's body arrives too slowly: {self.received} bytes in {seconds:.0f} s; send it again"
            raise Refused([Problem(field="body", message=text)], status=408) from None
        self.received += len(message.get("body", b""))
        self.arrived = not message.get("more_body", False)
        return message


class Replayed:
    """A `receive` that returns a body that has been read already, and then what follows it."""

    def __init__(self, body: bytes, receive: Receive):
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        message, self.body = {"type": "http.request", "body": self.body, "more_body": False}, None
        return message
