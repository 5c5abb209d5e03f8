"""POST /v1/weights: a body is bounded before it is read, and a push that is cut off is logged in one line."""

import asyncio
import logging
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from rollout_service.http.app import add_error_handlers
from rollout_service.http.routes import weights
from rollout_service.protocol import MAX_VERSION
from rollout_service.transports import RefusedUpdate


@pytest.fixture
def route(tmp_path):
    """`await route(content_type, chunks, version)` gives the status and the number of chunks read; None cuts it off."""
    pushed = []

    async def push(*arguments):
        pushed.append(arguments)

    def check_owner(run, take_over):
        if run == "another" and not take_over:
            raise RefusedUpdate("it belongs to a run", [], status=409)

    store = SimpleNamespace(
        sets={"policy": SimpleNamespace(largest_bytes=1 << 20, check_owner=check_owner)},
        folder=SimpleNamespace(path=tmp_path, new_file=lambda: tmp_path / "received.safetensors"),
    )
    app = FastAPI()
    app.state.fleet = SimpleNamespace(store=store, pushes=SimpleNamespace(push=push))
    app.include_router(weights.router)
    add_error_handlers(app)

    async def call(content_type, chunks, version=1, more=""):
        left, statuses = list(chunks), []

        async def receive():
            chunk = left.pop(0) if left else b""
            if chunk is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": chunk, "more_body": bool(left)}

        async def send(message):
            statuses.append(message.get("status"))

        scope = {
            "type": "http", "method": "POST", "path": "/v1/weights/policy", "raw_path": b"/v1/weights/policy",
            "root_path": "", "scheme": "http", "query_string": f"version={version}{more}".encode(),
            "headers": [(b"content-type", content_type.encode())],
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 5)
        assert pushed == []
        assert list(tmp_path.iterdir()) == [], "no bytes are left of a push that was refused or cut off"
        return statuses[0], len(chunks) - len(left)

    return call


@pytest.mark.parametrize(
    ("content_type", "read"), [("application/json", 2), ("application/json; charset=utf-8", 2), ("text/plain", 32)]
)
async def test_a_body_is_refused_at_its_limit_and_the_rest_is_not_read(route, content_type, read):
    """The limit is 64 KiB for a reference to a file, and for tensors the most that they can need, here 1 MiB."""
    assert await route(content_type, [b" " * (32 << 10), b" " * (32 << 10) + b" "] * 100) == (413, read)


async def test_a_version_too_large_for_the_queue_is_refused_before_the_body_is_read(route):
    status, read = await route("application/octet-stream", [b"x"] * 3, version=MAX_VERSION + 1)
    assert (status, read) == (400, 0)


async def test_a_push_of_another_run_is_refused_before_its_body_is_read(route):
    chunks = [b"x", b"x", None]
    assert await route("application/octet-stream", chunks, more="&run=another") == (409, 0)
    status, read = await route("application/octet-stream", chunks, more="&run=another&take_over=true")
    assert (status, read) == (weights.CLIENT_CLOSED_REQUEST, 3)


@pytest.mark.parametrize("more", ["&run=", "&run=" + "a" * 257, "&take_over=perhaps"])
async def test_an_invalid_run_name_is_refused(route, more):
    assert await route("application/octet-stream", [b"x"], more=more) == (400, 0)


@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream"])
async def test_a_push_that_is_cut_off_is_logged_in_one_line(route, content_type, caplog):
    with caplog.at_level(logging.INFO):
        status, _ = await route(content_type, [b"x", None, b""], version=7)
    assert status == weights.CLIENT_CLOSED_REQUEST
    (record,) = caplog.records
    assert record.message == "the push of policy version 7 ended before all of it arrived; nothing has changed"
    assert record.exc_info is None
