"""X-Request-Id: every answer has the request's id, and so do the engine and the log lines of the request."""

import asyncio
import logging
import re
import socket

import httpx
import pytest
from front import StubFleet, front

from rollout_service.http.starting import Starting

ID = "X-Request-Id"
PROMPT = {"prompt": "a"}
PREFLIGHT = {"Origin": "https://page.org", "Access-Control-Request-Method": "GET"}


@pytest.fixture
async def service():
    async with front(StubFleet(cors={"origins": ["https://page.org"]})) as (client, app):
        yield client, app


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("GET", "/health", {}, 200),
        ("HEAD", "/health", {}, 200),
        ("GET", "/v1/nothing", {}, 404),
        ("PATCH", "/health", {}, 405),
        ("POST", "/v1/rollouts", {"json": {}}, 400),
        ("POST", "/v1/rollouts", {"json": {"groups": [{"prompt": "a", "sampling": {"max_tokens": 4}}]}}, 200),
        ("POST", "/v1/completions", {"json": PROMPT}, 200),
        ("POST", "/v1/completions", {"json": PROMPT | {"stream": True}}, 200),
        (
            "OPTIONS",
            "/health",
            {"headers": PREFLIGHT},
            200,
        ),
    ],
)
async def test_every_answer_has_the_id_that_was_given_or_a_new_one(service, method, path, more, status):
    client, _ = service
    given = await client.request(method, path, **more | {"headers": more.get("headers", {}) | {ID: "mine 1"}})
    assert (given.status_code, given.headers.get_list(ID)) == (status, ["mine 1"])
    made = [(await client.request(method, path, **more)).headers[ID] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
    assert made[0] != made[1]


async def test_an_unforeseen_error_has_the_id_in_its_answer_and_its_log_line(service, caplog):
    client, app = service
    app.state.background.queue.close()
    with caplog.at_level(logging.ERROR, "rollout_service"):
        answer = await client.post("/v1/batches/lease", json={}, headers={ID: "mine"})
    assert (answer.status_code, answer.headers[ID]) == (500, "mine")
    assert caplog.messages == ["POST /v1/batches/lease failed: ProgrammingError (request mine)"]


async def test_a_log_line_of_a_task_that_works_for_the_request_names_it(service, caplog):
    client, app = service
    app.state.fleet.outcomes = {"a": RuntimeError("surprise")}
    body = {"groups": [{"id": "a", "prompt": "a", "sampling": {"max_tokens": 4}}]}
    with caplog.at_level(logging.ERROR, "rollout_service"):
        await client.post("/v1/rollouts", json=body, headers={ID: "mine"})
        logging.getLogger("rollout_service").error("of no request")
    assert caplog.messages == ["group a could not be generated (request mine)", "of no request"]


async def test_the_engine_gets_the_id_whether_it_was_given_or_made(service):
    client, app = service
    answers = [await client.post("/v1/completions", json=PROMPT, headers=h) for h in ({ID: "mine"}, {})]
    assert [asked.headers["x-request-id"] for asked in app.state.fleet.asked] == [a.headers[ID] for a in answers]


@pytest.mark.parametrize("wrong", [b"", b"a" * 129, b"a\tb", "é".encode()])
async def test_an_id_that_cannot_stand_in_a_log_line_is_refused(service, wrong):
    client, _ = service
    for path in ("/health", "/v1/models"):
        answer = await client.get(path, headers={ID: wrong})
        assert answer.status_code == 400
        assert "1 to 128 printable ASCII characters" in answer.text
        assert re.fullmatch("[0-9a-f]{32}", answer.headers[ID])


async def test_requests_at_the_same_time_keep_their_own_ids(service):
    client, _ = service
    names = [f"r{i}" for i in range(20)]
    answers = await asyncio.gather(*(client.post("/v1/completions", json=PROMPT, headers={ID: n}) for n in names))
    assert [answer.headers[ID] for answer in answers] == names


def test_a_starting_service_answers_with_the_id_too():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        starting = Starting(listener)
        starting.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/models"
            answer = httpx.get(url, headers={ID: "mine"}, trust_env=False)
        finally:
            starting.end()
    assert (answer.status_code, answer.headers[ID]) == (503, "mine")
