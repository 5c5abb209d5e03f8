"""A request through an ASGI application streams, and its end reaches the application."""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from rollout_service import asgi


async def collected(app, *arguments):
    return [part async for part in asgi.call(app, *arguments)]


async def test_status_headers_and_body_come_through():
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request):
        return {"got": (await request.body()).decode(), "header": request.headers["x-request-id"]}

    start, body = await collected(app, "POST", "/echo", {"x-request-id": "7"}, b"hello")
    assert start.status == 200
    assert ("content-type", "application/json") in start.headers
    assert body == b'{"got":"hello","header":"7"}'
    assert (await collected(app, "GET", "/nowhere", {}, b""))[0].status == 404


async def test_pieces_arrive_as_they_are_sent_and_closing_cancels_the_application():
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
