"""One request through an ASGI application, as a stream: how vLLM's own routes are reached inside an engine's actor."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple


class ResponseStart(NamedTuple):
    status: int
    headers: list[tuple[str, str]]


async def call(app: Any, method: str, path: str, headers: dict[str, str], body: bytes) -> AsyncIterator[Any]:
    """Yield one ResponseStart, then the body in pieces as the application sends them.

    Closing the iterator is the client's disconnection: the application is told so, and cancelled.
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

    async def receive() -> dict[str, Any]:
        for message in requests:
            return message
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, sent.put)
        finally:
            await sent.put(None)

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
        task.cancel()
