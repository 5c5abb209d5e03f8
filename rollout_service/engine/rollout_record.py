"""The rollout record in the answers of vLLM's own routes: an ASGI layer around vLLM's application.

A request says `return_rollout_record: true`. This layer takes the field out of the body, lets the engine's outputs be
collected (vllm_plugin/watched_outputs.py), and adds a record to each choice of the answer. It passes on the answers to
other requests untouched.
"""

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from rollout_service.protocol import RECORD, RETURN_RECORD
from rollout_service.vllm_plugin.watched_outputs import WATCHED, Watched

RECORDED = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
"""paths of the routes that generate"""
EVENT_END = b"\n\n"

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RolloutRecords:
    """vLLM's application with this layer around it."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in RECORDED:
            return await self.app(scope, receive, send)
        body = await whole_body(receive)
        watched, answer = Watched(), send
        # The bytes are searched first, because reading JSON takes longer than most requests need here.
        if body is not None and RETURN_RECORD.encode() in body and isinstance(fields := json.loads(body), dict):
            watched.recorded = fields.pop(RETURN_RECORD, None) is True
            body = json.dumps(fields).encode()
            scope = scope | {"headers": with_length(scope["headers"], len(body))}
            if watched.recorded:
                answer = Recording(watched, send)
        token = WATCHED.set(watched)
        try:
            return await self.app(scope, replayed(body, receive), answer)
        finally:
            WATCHED.reset(token)


class Recording:
    """A `send` that adds the records to a whole answer, or to the events of a stream."""

    def __init__(self, watched: Watched, send: Send):
        self.watched, self.send = watched, send
        self.start: Message = {}
        self.left = b""
        """what has come of a whole answer, or of the next event"""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            if self._is_stream():
                await self.send(message)
            return
        self.left += message.get("body", b"")
        ended = not message.get("more_body", False)
        if self._is_stream():
            *events, self.left = self.left.split(EVENT_END)
            body = b"".join(self._event(event) + EVENT_END for event in events)
            if ended:
                body += self.left
            if body or ended:
                await self.send(message | {"body": body})
        elif ended:
            body = self._recorded(self.left) if self.start["status"] == 200 else self.left
            await self.send(self.start | {"headers": with_length(self.start["headers"], len(body))})
            await self.send(message | {"body": body})

    def _is_stream(self) -> bool:
        return dict(self.start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")

    def _event(self, event: bytes) -> bytes:
        kind, _, data = event.partition(b": ")
        return b"data: " + self._recorded(data) if kind == b"data" and data != b"[DONE]" else event

    def _recorded(self, data: bytes) -> bytes:
        """The answer, or the chunk of a stream, with the records of the choices that end in it."""
        answer = json.loads(data)
        choices = list(ended_choices(answer))
        for choice in choices:
            call, index = divmod(choice["index"], self.watched.n)
            record = self.watched.calls[call][index]
            choice[RECORD] = record.model_dump(exclude_none=True)
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() if choices else data


def ended_choices(answer: Any) -> Iterator[dict[str, Any]]:
    for choice in answer.get("choices", ()):
        if choice.get("finish_reason") is not None:
            yield choice


async def whole_body(receive: Receive) -> bytes | None:
    """The request's body; None if the client has gone."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def replayed(body: bytes | None, receive: Receive) -> Receive:
    """A `receive` that returns a body that has been read already, and then what follows it."""
    gone: Message = {"type": "http.disconnect"}
    first = [gone if body is None else {"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


def with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]
