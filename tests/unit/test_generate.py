"""The routes between tokens: what the front checks before an engine sees the request."""

import json

import pytest
from front import StubFleet, front

GENERATE = "/inference/v1/generate"
BETWEEN_TEXT_AND_TOKENS = "/v1/completions/render", "/v1/chat/completions/render", "/tokenize", "/detokenize"


@pytest.fixture
async def service():
    async with front(StubFleet(drafter={"kind": "ngram", "draft_tokens": 2})) as (client, app):
        yield client, app.state.fleet


@pytest.mark.parametrize(
    ("params", "param", "words"),
    [
        ({"tempreature": 0.5}, "sampling_params.tempreature", "did you mean temperature"),
        ({"token_ids": [1]}, "sampling_params.token_ids", "no such field"),
        ({"n": 513}, "sampling_params.n", "1 to 512"),
        ({"top_k": 2**40}, "sampling_params.top_k", "out of range"),
        ({"temperature": 0.001}, "sampling_params.temperature", "0.001 is too low"),
        ({"min_p": 0.1}, "sampling_params.min_p", "cannot be used with a drafter on"),
        ({"seed": 0, "n": [2**70]}, "sampling_params", "64 bits"),
    ],
)
async def test_sampling_parameters_of_generate_are_checked_like_those_of_the_other_routes(
    service, params, param, words
):
    client, fleet = service
    response = await client.post(GENERATE, json={"token_ids": [1], "sampling_params": params})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, 400, param)
    assert words in error["message"]
    assert not fleet.asked


@pytest.mark.parametrize("wrong", [{"sampling_parms": {}}, {"min_p": 0.1}, {"return_rollout_record": 1}])
async def test_wrong_fields_beside_the_sampling_parameters_are_named_too(service, wrong):
    response = await service[0].post(GENERATE, json={"token_ids": [1], "sampling_params": {}} | wrong)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(wrong))


async def test_what_vllm_must_judge_reaches_it_unchanged(service):
    client, fleet = service
    for params in ({"min_p": 0.0, "temperature": 0.5}, "a", None):
        body = json.dumps({"token_ids": [1], "sampling_params": params, "return_rollout_record": False}).encode()
        response = await client.post(GENERATE, content=body, headers={"Content-Type": "application/json"})
        if isinstance(params, dict):
            assert response.status_code == 200
        assert fleet.asked[-1].body == body


async def test_generates_sampling_is_echoed_from_its_parameters(service):
    response = await service[0].post(GENERATE, json={"token_ids": [1], "sampling_params": {"top_k": 5}})
    assert json.loads(response.headers["x-sampling"]) == {"temperature": 1.0, "top_p": 1.0, "top_k": 5}


@pytest.mark.parametrize("path", BETWEEN_TEXT_AND_TOKENS)
async def test_routes_that_sample_nothing_echo_no_sampling_and_refuse_in_openais_form(service, path):
    client, _ = service
    response = await client.post(path, json={"prompt": "a"})
    assert response.status_code == 200
    assert "x-sampling" not in response.headers
    refused = await client.post(path, json={"promt": "a"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "promt")


@pytest.mark.parametrize("path", [GENERATE, *BETWEEN_TEXT_AND_TOKENS])
async def test_the_document_describes_the_bodies_and_the_record(service, path):
    document = (await service[0].get("/openapi.json")).json()
    operation = document["paths"][path]["post"]
    (schema,) = [content["schema"] for content in operation["requestBody"]["content"].values()]
    assert schema["$ref"].rpartition("/")[2] in document["components"]["schemas"]
    assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/OpenAIError")
    answer = json.dumps(operation["responses"]["200"])
    assert ("RolloutRecord" in answer) == ("text/event-stream" in answer) == (path == GENERATE)
    assert "token_ids" in document["components"]["schemas"]["RolloutRecord"]["properties"]
