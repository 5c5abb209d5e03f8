"""The server in an engine's actor and the front's connections to it, over real sockets. No vLLM is started."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from rollout_service.engine.http_server import HttpServer
from rollout_service.fleet.engine_http import CONNECTION_LOST, EngineHttp

app = FastAPI()
begun, ended = [], []


@app.exception_handler(Exception)
async def answered(request, error):
    return JSONResponse({"error": str(error)}, 500)


@app.post("/echo")
async def echo(request: Request):
    return {"got": (await request.body()).decode(), "header": request.headers["x-request-id"]}


@app.post("/fails")
async def fails():
    raise IndexError("no such token")


@app.post("/slow")
async def slow(request: Request):
    """As in vLLM's `with_cancellation`, the handler runs in a task of its own, beside one that waits for the end."""
    begun.append("slow")

    async def handler():
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("slow")

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(handler()), asyncio.create_task(gone())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


@app.post("/stream")
async def stream():
    async def endless():
        begun.append("stream")
        try:
            while True:
                yield "data: x\n\n"
                await asyncio.sleep(0.001)
        finally:
            ended.append("stream")

    return StreamingResponse(endless(), media_type="text/event-stream")


@app.post("/silent")
async def silent():
    async def one_event():
        begun.append("silent")
        yield "data: x\n\n"
        await asyncio.Event().wait()

    return StreamingResponse(one_event(), media_type="text/event-stream")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "token").write_text(tmp_path.name)
    begun.clear(), ended.clear()
    return tmp_path


async def application():
    return app


def served(folder):
    """Connections to an engine's server."""
    server = HttpServer(SimpleNamespace(errored=False), application, folder, "the key", 0)
    return EngineHttp(server.start(), "the key")


async def all_of(first, others):
    return [await first, *[piece async for piece in others]]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def elsewhere(monkeypatch):
    """A node without the service's folder."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    return Path("/nowhere/rollout-service-3f")


async def test_status_headers_and_body_arrive_unchanged(folder):
    engine = served(folder)
    answer = await engine.ask("POST", "/echo", {"x-request-id": "7"}, b"hello")
    assert (answer.status, answer.body) == (200, b'{"got":"hello","header":"7"}')
    assert answer.headers["content-type"] == "application/json"
    assert (await engine.ask("GET", "/nowhere", {}, b"")).status == 404
    failed = await engine.ask("POST", "/fails", {}, b"")
    assert (failed.status, failed.body) == (500, b'{"error":"no such token"}')
    await engine.close()


async def test_events_arrive_as_they_are_sent_and_closing_them_ends_the_handler(folder):
    engine = served(folder)
    answer = await engine.ask("POST", "/stream", {}, b"")
    assert (await anext(answer.body)).startswith(b"data: x\n\n")
    assert not ended
    await answer.body.aclose()
    await until(lambda: ended == ["stream"])
    await engine.close()


async def test_a_cancelled_request_ends_a_handler_in_a_task_of_its_own(folder):
    engine = served(folder)
    asked = asyncio.create_task(engine.ask("POST", "/slow", {}, b""))
    await until(lambda: begun)
    asked.cancel()
    await until(lambda: ended)
    assert ended == ["slow"]
    await engine.close()


@pytest.mark.parametrize("path", ["/stream", "/silent"])
async def test_closing_the_connections_ends_requests_that_wait_and_streams_that_run(folder, path):
    engine = served(folder)
    events = (await engine.ask("POST", path, {}, b"")).body
    assert await anext(events)
    following = asyncio.create_task(anext(events))
    waiting = asyncio.create_task(engine.ask("POST", "/slow", {}, b""))
    await until(lambda: len(begun) == 2)
    await engine.close()
    with pytest.raises(CONNECTION_LOST):
        await asyncio.wait_for(waiting, 2)
    with pytest.raises(CONNECTION_LOST):
        await asyncio.wait_for(all_of(following, events), 2)


async def test_an_engine_that_is_not_there_is_a_lost_connection(folder):
    with pytest.raises(CONNECTION_LOST):
        await EngineHttp(str(folder / "engine-0-none"), "the key").ask("POST", "/echo", {}, b"")


async def test_on_another_node_only_the_services_own_requests_are_answered(elsewhere):
    engine = served(elsewhere)
    answer = await engine.ask("POST", "/echo", {"x-request-id": "7"}, b"hello")
    assert answer.status == 200
    async with aiohttp.ClientSession() as stranger:
        for headers in ({}, {"x-engine-key": "wrong"}, {"x-engine-key": elsewhere.name}):
            async with stranger.post(f"{engine.url}/echo", headers=headers) as refused:
                assert refused.status == 403
    await engine.close()


async def test_the_answer_of_a_dead_core_is_not_passed_on(folder, monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended

    monkeypatch.setattr("os._exit", end)
    sent = []

    async def send(message):
        sent.append(message)

    async def dead(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})

    async def raises(scope, receive, send):
        raise RuntimeError("EngineCore died")

    for failing in (dead, raises):
        server = HttpServer(SimpleNamespace(errored=True), None, folder, "the key", 0)
        server.app, server.asks_for_key = failing, False
        with pytest.raises(Ended):
            await server({"method": "POST", "path": "/"}, None, send)
    assert not sent


async def test_an_error_that_the_application_does_not_answer_is_answered_in_one_line(folder):
    async def raises(scope, receive, send):
        raise IndexError("no such\n token")

    server = HttpServer(SimpleNamespace(errored=False), None, folder, "the key", 0)
    server.app = raises
    engine = EngineHttp(server.start(), "the key")
    answer = await engine.ask("POST", "/v1/completions", {}, b"")
    assert answer.status == 500
    assert json.loads(answer.body)["error"]["message"] == "the engine could not answer: IndexError: no such token"
    await engine.close()
