"""Bodies and headers over a real connection: limits of size and of time."""

import asyncio
from contextlib import asynccontextmanager

import pytest
import uvicorn
from front import StubFleet, front

from rollout_service.http import guard, timed_connection
from rollout_service.http.timed_connection import TimedConnection
from rollout_service.serve import Server, url_of

LIMIT = 1 << 20
HEAD = b"POST /v1/rollouts HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
BODY = b'{"groups": [{"prompt": "a", "sampling": {"max_tokens": 4}}]}'


@asynccontextmanager
async def listening():
    """The port of a front that accepts bodies of up to LIMIT bytes."""
    async with front(StubFleet(body_limit_mib=1)) as (_, app):
        server = Server(uvicorn.Config(app, http=TimedConnection, port=0, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            await serving


@pytest.fixture
async def port():
    async with listening() as port:
        yield port


async def status_of(reader) -> int:
    return int((await asyncio.wait_for(reader.readline(), 5)).split()[1])


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


async def test_a_body_in_chunks_is_read_like_any_other(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY[:10], BODY[10:], b""))
    assert await status_of(reader) == 200
    writer.close()


@pytest.mark.parametrize("with_length", [True, False])
async def test_a_body_over_the_limit_is_413_with_and_without_a_length(port, with_length):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if with_length:
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1))
    else:
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b" " * LIMIT, b"  "))
    assert await status_of(reader) == 413
    writer.close()


async def test_a_body_that_arrives_too_slowly_is_cut_off(port, monkeypatch):
    monkeypatch.setattr(guard, "IDLE", 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD + b"Content-Length: 1000\r\n\r\n")

    async def trickle():
        while True:
            writer.write(b" ")
            await asyncio.sleep(0.1)

    trickling = asyncio.create_task(trickle())
    assert await status_of(reader) == 408
    trickling.cancel()
    writer.close()


async def test_headers_that_arrive_too_slowly_are_cut_off_also_on_a_reused_connection(port, monkeypatch):
    monkeypatch.setattr(timed_connection, "HEAD_WITHIN", 0.5)
    for used in (False, True):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if used:
            writer.write(b"GET /health HTTP/1.1\r\nHost: service\r\n\r\n")
            assert await status_of(reader) == 200
            while (await reader.readline()).strip():
                pass
            assert await reader.readexactly(len(b'{"status":"up"}')) == b'{"status":"up"}'
        began = asyncio.get_running_loop().time()
        writer.write(b"GET /health HTTP/1.1\r\nHost: service\r\nX-Slow: ")
        for _ in range(20):
            writer.write(b"X")
            await asyncio.sleep(0.1)
            if reader.at_eof():
                break
        assert reader.at_eof()
        assert asyncio.get_running_loop().time() - began < 1.5
        writer.close()


async def test_an_answer_may_take_longer_than_a_request(port, monkeypatch):
    monkeypatch.setattr(guard, "IDLE", 0.3)
    monkeypatch.setattr(timed_connection, "HEAD_WITHIN", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    wait = b'{"wait": 1.2}'
    head = HEAD.replace(b"/v1/rollouts", b"/v1/batches/lease")
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(wait) + wait)
    assert await status_of(reader) == 200
    writer.close()


@pytest.mark.parametrize(
    ("scheme", "host", "url"),
    [
        ("http", "127.0.0.1", "http://127.0.0.1:8000"),
        ("http", "::1", "http://[::1]:8000"),
        ("https", "::1", "https://[::1]:8000"),
        ("https", "h", "https://h:8000"),
    ],
)
def test_the_printed_address_is_one_that_clients_take(scheme, host, url):
    assert url_of(scheme, host, 8000) == url
