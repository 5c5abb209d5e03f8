"""Guard of every request: its token, the size of its body, and the time that it may take to arrive.

It is plain ASGI, so that a disconnection reaches a route that streams.
"""

import asyncio
import time
from collections.abc import Collection
from typing import Any

from fastapi import Request
from starlette.types import Message, Receive, Scope, Send

from rollout_service.http.admission import Refused, stopping
from rollout_service.http.errors import answer
from rollout_service.http.tokens import Tokens
from rollout_service.protocol import INTERFACE_VERSION, VERSION_HEADER, Problem

IDLE = 60.0
"""seconds that a body may take to arrive, in addition to the time that its size takes at SLOWEST"""
SLOWEST = 1 << 20
"""bytes a second"""
WEIGHTS = "/v1/weights/"


VERSION_KEY, OWN_VERSION = VERSION_HEADER.encode(), str(INTERFACE_VERSION).encode()


class Guard:
    """ASGI middleware. It checks the bearer token and the client's version of the interface. It reads each body whole,
    within limits, before a route sees it. Only pushed weights go on to their route as they arrive, because that route
    limits them by the size of the tensors.

    Every request passes it, so it reads the raw headers: Starlette's objects would cost more than all of its checks.
    """

    def __init__(
        self, app: Any, tokens: Tokens, body_limit: int, stopping: asyncio.Event, origins: Collection[str] = ()
    ):
        """`origins`: those of web pages that may call the service, or "*"."""
        self.app, self.tokens, self.body_limit, self.stopping = app, tokens, body_limit, stopping
        self.origins = None if "*" in origins else frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            self.check(scope["path"], headers)
            if b"content-length" in headers or b"transfer-encoding" in headers:  # else there is no body
                receive = Paced(receive)
                if not scope["path"].startswith(WEIGHTS):
                    receive = Replayed(await self.body(headers, receive), receive)
        except Refused as error:
            refusal = answer(Request(scope), error.status, str(error), error.problems)
            return await refusal(scope, receive, send)
        except Gone:
            return None
        if scope["method"] == "HEAD":  # the server leaves out the body
            scope = dict(scope) | {"method": "GET"}
        return await self.app(scope, receive, send)

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises Refused for a request that is wrong whatever its body holds."""
        self._check_origin(headers)
        self.tokens.check(path, headers.get(b"authorization", b""))
        client = headers.get(VERSION_KEY, OWN_VERSION)
        if client != OWN_VERSION:
            given = client.decode("latin-1")
            versions = f"the client has version {given} of the interface, and this service version {INTERFACE_VERSION}"
            message = f"{versions}; install the same release of rollout-service on both sides"
            raise Refused([Problem(field=VERSION_HEADER, message=message)])
        if self.stopping.is_set():
            raise stopping()

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Raises Refused (403) for a page of another origin. A browser sends it simple requests, such as a POST without
        a content type, without asking first whether it may."""
        origin = headers.get(b"origin")
        if origin is None or self.origins is None or origin in self.origins:
            return
        if origin.partition(b"://")[2] == headers.get(b"host"):  # a page of this service
            return
        message = f"pages of {origin.decode('latin-1')} may not call this service; name it in cors.origins to allow it"
        raise Refused([Problem(field="Origin", message=message)], status=403)

    async def body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises Refused (413) when it is too large, by its header or as it arrives. Raises Gone when
        the client leaves."""
        length = int(headers.get(b"content-length", b"0"))
        if length > self.body_limit:
            raise self._too_large(str(length))
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.body_limit:
                raise self._too_large(f"more than {self.body_limit}")
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

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
