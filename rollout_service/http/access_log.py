"""The access log: one line on stderr for each request, when its answer ends."""

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_service.http.errors import CLIENT_CLOSED_REQUEST
from rollout_service.http.request_id import KEY

logger = logging.getLogger("rollout_service.access")
SESSION = b"x-session-id"
LONGEST_SESSION = 128
"""characters of the session's header that are logged"""


class AccessLog:
    """ASGI middleware around RequestIds. A client that leaves is noticed where its route waits for that, as every route
    does that streams, generates or waits."""

    def __init__(self, app: ASGIApp, form: Literal["text", "json"]):
        self.app, self.form = app, form
        write_to_stderr()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.monotonic()
        counted = Counted(receive, send)
        try:
            await self.app(scope, counted.receive, counted.send)
        finally:
            line = entry(scope, counted, time.monotonic() - began)
            logger.info("%s", json.dumps(line) if self.form == "json" else as_text(line))


class Counted:
    """`receive` and `send` of one request, and what went through them."""

    def __init__(self, receive: Receive, send: Send):
        self._receive, self._send = receive, send
        self.status: int | None = None
        self.bytes_in = self.bytes_out = 0
        self.whole = self.gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
        elif not self.whole:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
        await self._send(message)


def entry(scope: Scope, counted: Counted, seconds: float) -> dict[str, Any]:
    """The path is without its query, which may hold secrets."""
    client, path = scope.get("client"), scope.get("raw_path") or scope["path"].encode()
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "id": scope[KEY].decode(),
        "method": scope["method"],
        "path": path.decode("ascii", "backslashreplace"),
        "status": CLIENT_CLOSED_REQUEST if counted.gone or counted.status is None else counted.status,
        "seconds": round(seconds, 6),
        "bytes_in": counted.bytes_in,
        "bytes_out": 0 if scope["method"] == "HEAD" else counted.bytes_out,  # the server leaves the body out
        "client": f"{client[0]}:{client[1]}" if client else None,
    }
    session = next((value for name, value in scope["headers"] if name == SESSION), None)
    if session is not None:
        line["session"] = session[:LONGEST_SESSION].decode("ascii", "backslashreplace")
    return line


def as_text(line: dict[str, Any]) -> str:
    """`TIME CLIENT "METHOD PATH" STATUS SECONDS in=BYTES out=BYTES id="ID" session="SESSION"`. What a client chose is
    quoted as in JSON, so that it cannot look like another field."""
    request = json.dumps(f"{line['method']} {line['path']}")
    text = (
        f"{line['time']} {line['client'] or '-'} {request} {line['status']} {line['seconds']:.6f} "
        f"in={line['bytes_in']} out={line['bytes_out']} id={json.dumps(line['id'])}"
    )
    return f"{text} session={json.dumps(line['session'])}" if "session" in line else text


def write_to_stderr() -> None:
    """Whole lines without a prefix, apart from the service's log of warnings and errors."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
