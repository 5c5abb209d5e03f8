"""The layer that adds rollout records to the answers of vLLM's application, over a toy application."""

import json

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from rollout_service.engine.rollout_record import RECORDED, RolloutRecords
from rollout_service.protocol import RolloutRecord
from rollout_service.vllm_plugin.watched_outputs import WATCHED

PATH = "/v1/completions"


def record(prompt, index):
    return RolloutRecord(prompt_token_ids=[prompt], token_ids=[index], logprobs=[-0.5], weight_versions=[], engine=0)


def application(seen):
    """It answers as vLLM's handlers do: prompts in order, each with n choices."""
    app = FastAPI()

    @app.post(PATH)
    @app.post("/tokenize")
    async def complete(request: Request):
        body = await request.json()
        seen.append((body, WATCHED.get(), int(request.headers["content-length"]) == len(await request.body())))
        if body.get("wrong"):
            return JSONResponse({"error": {"code": 400}}, 400)
        n = body.get("n") or 1
        watched = WATCHED.get()
        if watched is not None:
            watched.n = n
            watched.calls += [{i: record(prompt, i) for i in range(n)} for prompt in range(2)]
        choices = [{"index": i, "text": "é\n\n", "finish_reason": "stop"} for i in range(2 * n)]
        if not body.get("stream"):
            return JSONResponse({"choices": choices})

        async def events():
            for choice in choices:
                first = json.dumps({"choices": [choice | {"finish_reason": None}]})
                yield f"data: {first}\n\n"
                yield f"data: {json.dumps({'choices': [choice]})}\n"  # an event may come in pieces
                yield "\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture
async def service():
    seen = []
    transport = httpx.ASGITransport(RolloutRecords(application(seen)))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        yield client, seen


async def test_each_choice_gets_the_record_of_its_prompt_and_index(service):
    client, seen = service
    response = await client.post(PATH, json={"n": 3, "return_rollout_record": True})
    assert int(response.headers["content-length"]) == len(response.content)
    choices = response.json()["choices"]
    found = [(c["rollout_record"]["prompt_token_ids"], c["rollout_record"]["token_ids"]) for c in choices]
    assert found == [([prompt], [index]) for prompt in range(2) for index in range(3)]
    assert choices[0]["text"] == "é\n\n"
    ((body, watched, length_is_right),) = seen
    assert (body, watched.recorded, length_is_right) == ({"n": 3}, True, True)


async def test_in_a_stream_the_record_comes_with_the_chunk_that_ends_the_choice(service):
    response = await service[0].post(PATH, json={"stream": True, "return_rollout_record": True})
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert ["rollout_record" in choice for choice in choices] == [False, True, False, True]
    assert [choice["rollout_record"]["prompt_token_ids"] for choice in choices[1::2]] == [[0], [1]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [{}, {"return_rollout_record": False}, {"return_rollout_record": None}])
async def test_other_requests_are_answered_as_by_the_application_and_still_watched(service, asked, stream):
    client, seen = service
    response = await client.post(PATH, json={"stream": stream} | asked)
    assert "rollout_record" not in response.text
    ((body, watched, length_is_right),) = seen
    assert (body, watched.recorded, length_is_right) == ({"stream": stream}, False, True)


async def test_an_error_and_a_route_that_does_not_generate_pass_through(service):
    client, seen = service
    response = await client.post(PATH, json={"wrong": True, "return_rollout_record": True})
    assert (response.status_code, response.json()) == (400, {"error": {"code": 400}})
    assert "/tokenize" not in RECORDED
    await client.post("/tokenize", json={})
    assert seen[-1][1] is None
    assert WATCHED.get() is None
