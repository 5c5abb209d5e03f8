"""The access log: one line a request, with what a client is told and never with what it must keep secret."""

import asyncio
import json
import logging

import pytest
from front import StubFleet, front

from rollout_service.http import access_log

ANSWER = b'{"status":"up"}'


@pytest.fixture
def lines(monkeypatch):
    """The lines that are logged."""
    kept = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())
    monkeypatch.setattr(access_log.logger, "handlers", [handler])
    return kept


async def test_it_is_off_unless_it_is_asked_for(lines):
    async with front(StubFleet()) as (client, app):
        await client.get("/health")
    assert lines == []
    assert not isinstance(app.middleware_stack, access_log.AccessLog)


async def test_a_line_of_json_says_who_asked_what_and_what_was_answered(lines):
    async with front(StubFleet(access_log="json", token="hush")) as (client, _):
        headers = {"X-Request-Id": "mine", "X-Session-ID": "s 1", "Authorization": "Bearer hush"}
        await client.post("/v1/completions?key=hush", json={"prompt": "a"}, headers=headers)
        await client.get("/health")
        await client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
    first, second, third = map(json.loads, lines)
    assert first.pop("time").endswith("Z")
    assert 0 <= first.pop("seconds") < 5
    assert first.pop("bytes_out") > 50  # the query is refused
    assert first == {
        "id": "mine", "method": "POST", "path": "/v1/completions", "status": 400, "bytes_in": 14,
        "client": "127.0.0.1:123", "session": "s 1",
    }  # fmt: skip
    assert (second["status"], second["bytes_in"], second["bytes_out"]) == (200, 0, len(ANSWER))
    assert "session" not in second
    assert third["status"] == 401
    assert not any("hush" in line for line in lines)


async def test_a_line_of_text_quotes_what_a_client_chose(lines):
    async with front(StubFleet(access_log="text")) as (client, _):
        headers = {"X-Request-Id": 'a" 200', "X-Session-ID": "é\x01"}
        await client.get("/v1/no%0Athing", headers={k: v.encode() for k, v in headers.items()})
    (line,) = lines
    assert r'127.0.0.1:123 "GET /v1/no%0Athing" 404 0.' in line
    assert line.endswith(r'id="a\" 200" session="\\xc3\\xa9\u0001"')
    assert "\n" not in line


async def test_an_unforeseen_error_is_logged_as_500(lines):
    async with front(StubFleet(access_log="json")) as (client, app):
        app.state.background.queue.close()
        await client.post("/v1/batches/lease", json={})
    assert [json.loads(line)["status"] for line in lines] == [500]


@pytest.mark.parametrize(
    ("path", "body", "whole"),
    [
        ("/v1/completions", {"prompt": "slow"}, False),
        ("/v1/completions", {"prompt": "slow", "stream": True}, False),
        ("/v1/rollouts", {"groups": [{"id": "slow", "prompt": "a", "sampling": {"max_tokens": 4}}]}, False),
        ("/v1/batches/lease", {"wait": 60}, False),
        ("/v1/completions", {"prompt": "fast"}, True),
    ],
)
async def test_a_client_that_leaves_early_is_logged_as_499(lines, path, body, whole):
    async with front(StubFleet(access_log="json")) as (_, app):
        app.state.fleet.outcomes = {"slow": 60}
        left, sent = asyncio.Event(), []
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        head = {"content-type": "application/json", "content-length": "1"}
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in head.items()], "client": None, "server": ("a", 1),
        }  # fmt: skip
        asked = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.05)
        left.set()
        await asyncio.wait_for(asked, 5)
    assert [json.loads(line)["status"] for line in lines] == [200 if whole else 499]


def test_whole_lines_go_to_stderr(monkeypatch, capsys):
    monkeypatch.setattr(access_log.logger, "handlers", [])
    access_log.write_to_stderr()
    access_log.write_to_stderr()
    access_log.logger.info("%s", '{"a": 1}')
    assert capsys.readouterr().err == '{"a": 1}\n'
