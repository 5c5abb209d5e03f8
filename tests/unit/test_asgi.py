"""A request through an ASGI application streams, and the application notices when it is closed."""

import asyncio

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from rollout_service.engine import asgi


async def collected(app, *arguments):
    return [part async for part in asgi.call(app, *arguments)]


async def test_status_headers_and_body_arrive_unchanged():
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request):
        return {"got": (await request.body()).decode(), "header": request.headers["x-request-id"]}

    start, body = await collected(app, "POST", "/echo", {"x-request-id": "7"}, b"hello")
    assert start.status == 200
    assert ("content-type", "application/json") in start.headers
    assert body == b'{"got":"hello","header":"7"}'
    assert (await collected(app, "GET", "/nowhere", {}, b""))[0].status == 404


async def test_chunks_arrive_as_they_are_sent_and_closing_ends_the_application():
    app = FastAPI()
    cancelled = asyncio.Event()

    @app.get("/stream")
    async def stream():
        async def endless():
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0)
            finally:
                cancelled.set()

        return StreamingResponse(endless())

    call = asgi.call(app, "GET", "/stream", {}, b"")
    assert (await anext(call)).status == 200
    assert await anext(call) == b"x"
    await call.aclose()
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_closing_ends_a_handler_that_the_application_waits_for_in_a_second_task():
    """As in vLLM's `with_cancellation`, where cancelling the waiting task would leave the handler running."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handler():
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async def app(scope, receive, send):
        async def gone():
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(handler()), asyncio.create_task(gone())]
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()

    first = asyncio.create_task(anext(asgi.call(app, "POST", "/", {}, b"")))
    await begun.wait()
    first.cancel()
    assert await asyncio.wait_for(ended.wait(), 1), "within a second"


async def test_an_error_that_was_answered_is_a_complete_answer_and_any_other_is_raised():
    app = FastAPI()

    @app.exception_handler(Exception)
    async def answered(request, error):
        return JSONResponse({"error": str(error)}, 500)

    @app.get("/fails")
    async def fails():
        raise IndexError("no such token")

    start, body = await collected(app, "GET", "/fails", {}, b"")
    assert (start.status, body) == (500, b'{"error":"no such token"}')

    async def unanswered(scope, receive, send):
        raise IndexError("no such token")

    with pytest.raises(IndexError):
        await collected(unanswered, "GET", "/", {}, b"")
