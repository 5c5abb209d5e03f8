"""Start of a service: until its engines are in service it answers 503 with Retry-After, on every path.

It runs in a thread of its own, because starting the engines blocks the main thread for seconds at a time.
"""

import asyncio
import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_service.config import TLSConfig
from rollout_service.http.errors import answer
from rollout_service.http.request_id import RequestIds
from rollout_service.http.timed_connection import TimedConnection

MESSAGE = "the service is starting: its engines are not in service yet; try again"
ENDS_WITHIN = 1
"""seconds that open requests have when the service itself takes over; each is answered at once"""


class Starting(threading.Thread):
    """Answers the listener's connections from `start` to `end`. Later connections wait for the service itself."""

    def __init__(
        self, listener: socket.socket, around: Callable[[ASGIApp], ASGIApp] = RequestIds, tls: TLSConfig | None = None
    ):
        """`around` adds what every answer of the service passes through (outermost.py)."""
        tls = tls or TLSConfig()
        super().__init__(name="starting", daemon=True)
        settings = uvicorn.Config(
            around(starting), http=TimedConnection, log_level="warning", timeout_graceful_shutdown=ENDS_WITHIN,
            lifespan="off", ssl_certfile=tls.certificate, ssl_keyfile=tls.key,
        )  # fmt: skip
        self.server = uvicorn.Server(settings)
        # uvicorn closes the socket that it is given, and the service still needs the listener.
        self.sockets = [listener.dup()]

    def run(self) -> None:
        asyncio.run(self.server.serve(self.sockets))

    def end(self) -> None:
        self.server.should_exit = True
        self.join()


async def starting(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application. It closes each connection, so that the next request reaches the service itself."""
    if scope["type"] == "http":
        response = answer(Request(scope), 503, MESSAGE, headers={"Connection": "close"})
        await response(scope, receive, send)
