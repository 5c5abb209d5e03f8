"""GET /v1/models and /v1/models/{model}: what OpenAI's client and vLLM's clients read."""

import pytest
from front import StubFleet, front


@pytest.fixture(params=["demo", "org/name"])
async def served(request):
    async with front(StubFleet(name=request.param, drafter={"kind": "mtp", "draft_tokens": 3})) as (client, _):
        yield client, request.param


async def test_openais_client_lists_and_retrieves_the_model(served):
    from openai import AsyncOpenAI, NotFoundError

    http, name = served
    client = AsyncOpenAI(base_url="http://service/v1", api_key="none", http_client=http)
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == [name]
    assert await client.models.retrieve(name) == listed[0]
    with pytest.raises(NotFoundError) as missing:
        await client.models.retrieve("gpt-5")
    assert missing.value.body == {
        "message": f"model: unknown model 'gpt-5'; this service has {name!r}",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


async def test_the_answer_is_vllms_with_the_context_that_a_request_may_fill(served):
    client, name = served
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert isinstance(model.pop("created"), int)
    assert model == {
        "id": name, "object": "model", "owned_by": "vllm", "root": name, "parent": None, "max_model_len": 60,
        "routed_experts": False,
    }  # fmt: skip
    assert (await client.get(f"/v1/models/{name}")).json() == {**model, "created": pytest.approx(2e9, rel=1)}
    assert (await client.head(f"/v1/models/{name}")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/chat/completions/", "/v1/completions/"])
async def test_a_slash_at_the_end_is_redirected_with_method_and_body(served, path):
    client, _ = served
    answer = await client.post(path, json={}) if "completions" in path else await client.get(path)
    assert answer.status_code == 307
    assert answer.headers["location"].removeprefix("http://service") == path.rstrip("/")
