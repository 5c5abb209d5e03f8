"""ASGI: one request to an application, answered as a stream. It reaches vLLM's own routes in an engine's actor."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

logger = logging.getLogger("rollout_service")


class ResponseStart(NamedTuple):
    status: int
    headers: list[tuple[str, str]]


async def call(app: Any, method: str, path: str, headers: dict[str, str], body: bytes) -> AsyncIterator[Any]:
    """Yield one ResponseStart, then the body in pieces as the application sends them.

    Closing the iterator means that the client disconnected. The application is told so and ends by itself, as under a
    web server. It is not cancelled, because vLLM's routes wait for their handler in a second task: a cancellation would
    end only the waiting, and the handler would generate to the end.

    Raises what the application raises before its answer is whole. Starlette raises an error again after it has
    answered it; such an error is only logged.
    """
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
    }  # fmt: skip
    sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    disconnected = asyncio.Event()
    requests = iter([{"type": "http.request", "body": body, "more_body": False}])
    whole = False

    async def receive() -> dict[str, Any]:
        for message in requests:
            return message
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal whole
        whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        sent.put_nowait(message)

    async def run() -> None:
        try:
            await app(scope, receive, send)
        except Exception:
            if not whole:
                raise
            logger.exception("%s %s was answered with an error", method, path)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                pairs = [(k.decode(), v.decode()) for k, v in message["headers"]]
                yield ResponseStart(message["status"], pairs)
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        disconnected.set()
        await asyncio.wait({task})
