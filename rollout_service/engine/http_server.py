"""The HTTP server in an engine's actor: vLLM's own routes, which the front passes requests on to.

A request does not pass Ray, whose streams cost more processor time than everything else that the front does. On the
front's machine the server listens on a Unix socket in the service's folder, which only the service's user can enter. On
another node it listens on a TCP port, and each request must hold the service's key, which no one else knows.
"""

import asyncio
import logging
import os
import secrets
import socket
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from rollout_service.transports.folder import is_of_this_machine

logger = logging.getLogger("rollout_service")

KEY_HEADER = "x-engine-key"
BACKLOG = 2048
"""connections that wait to be accepted"""
KEPT_ALIVE = 3600
"""seconds that an idle connection of the front stays open"""


class HttpServer:
    """Serves one engine. Use: `server = HttpServer(...); address = server.start()`."""

    def __init__(self, llm: Any, make_app: Callable[[], Awaitable[Any]], folder: Path, key: str, index: int):
        """`make_app` makes vLLM's application. It is called when the first request comes, because importing it takes
        seconds. `folder` is the service's, which exists on the front's machine only."""
        self.llm, self.make_app, self.folder, self.index = llm, make_app, folder, index
        self.key = key.encode()
        self.asks_for_key = True
        self.app: Any = None
        self.making = asyncio.Lock()
        self.serving: asyncio.Task[None] | None = None

    def start(self) -> str:
        """Listen. Returns the address: a path, or `host:port`."""
        if is_of_this_machine(self.folder):
            listener = socket.socket(socket.AF_UNIX)
            self.asks_for_key = False
            address = str(self.folder / f"engine-{self.index}-{uuid.uuid4().hex[:8]}")
            listener.bind(address)
            listener.listen(BACKLOG)  # the front may connect before uvicorn has begun
        else:
            import ray

            listener = socket.create_server((ray.util.get_node_ip_address(), 0))
            address = "{}:{}".format(*listener.getsockname()[:2])
        settings = uvicorn.Config(
            self, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=KEPT_ALIVE
        )
        self.serving = asyncio.create_task(uvicorn.Server(settings).serve([listener]))
        return address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's routes answer the death of its core like any error. That answer must not be passed on: the actor ends,
        and the fleet asks another engine. Any other error that vLLM's routes do not answer is answered here."""
        if self.asks_for_key and not secrets.compare_digest(key_of(scope), self.key):
            return await answer((scope, receive, send), 403, "this port is the service's own")
        has_begun = False

        async def checked(message: Message) -> None:
            nonlocal has_begun
            self._end_with_core()
            has_begun = True
            await send(message)

        try:
            if self.app is None:
                async with self.making:
                    self.app = self.app or await self.make_app()
            await self.app(scope, receive, checked)
        except Exception as error:
            self._end_with_core()
            logger.exception("%s %s was answered with an error", scope["method"], scope["path"])
            if not has_begun:  # Starlette raises an error again after it has answered it
                message = f"the engine could not answer: {type(error).__name__}: {' '.join(str(error).split())}"
                await answer((scope, receive, send), 500, message)

    def _end_with_core(self) -> None:
        if self.llm.errored:
            os._exit(1)


async def answer(connection: tuple[Scope, Receive, Send], status: int, message: str) -> None:
    """Send an error in the form of vLLM's own."""
    kind = {403: "ForbiddenError", 500: "InternalServerError"}[status]
    error = {"message": message, "type": kind, "param": None, "code": status}
    await JSONResponse({"error": error}, status)(*connection)


def key_of(scope: Scope) -> bytes:
    return dict(scope["headers"]).get(KEY_HEADER.encode(), b"")
