"""One launched service with its MTP head: everything that a user does over HTTP."""

import asyncio
import http.client
import json
import os
import time

import httpx
import psutil
import pytest
from engines import MODELS, wait_until
from over_http import PROMPT, requests, worst_difference

from rollout_service.client import AsyncRolloutClient, RolloutError
from rollout_service.protocol import GroupRequest, Sampling


def test_every_field_of_a_completion_means_what_the_design_says(client):
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    metadata = {"a": [1], "separators": "\u2028\u2029\x85\r\n"}
    asked = [
        GroupRequest(id="text", prompt=PROMPT, n=3, sampling=Sampling(max_tokens=48, **sampling), metadata=metadata),
        GroupRequest(id="ids", prompt_token_ids=[10, 11], sampling=Sampling(max_tokens=8, ignore_eos=True, **sampling)),
        GroupRequest(id="chat", messages=[{"role": "user", "content": PROMPT.strip()}],
                     sampling=Sampling(max_tokens=48, **sampling)),
    ]  # fmt: skip
    groups = {group.id: group for group in client.rollouts(asked, model="demo-policy")}
    assert groups.keys() == {"text", "ids", "chat"}
    assert groups["text"].metadata == metadata
    assert groups["text"].prompt_token_ids == groups["chat"].prompt_token_ids  # the chat template adds the newline
    assert [c.index for c in groups["text"].completions] == [0, 1, 2]
    for group in groups.values():
        for c in group.completions:
            assert len(c.token_ids) == len(c.logprobs)
            assert c.finish_reason == ("length" if len(c.token_ids) in (8, 48) else "stop")
            assert [(s.start, s.end) for s in c.weight_versions] == [(0, len(c.token_ids))]
            s = c.speculation
            assert s.drafter == "mtp"
            assert s.draft_steps == sum(s.accepted_histogram)
            assert s.accepted == sum(j * steps for j, steps in enumerate(s.accepted_histogram))
            assert s.accepted <= s.drafted
    assert worst_difference(groups.values(), MODELS / "policy", **sampling) < 1e-4


def test_groups_are_streamed_as_each_finishes(client):
    slow = GroupRequest(id="slow", prompt=PROMPT, n=8, sampling=Sampling(max_tokens=400, ignore_eos=True))
    fast = GroupRequest(id="fast", prompt=PROMPT, sampling=Sampling(max_tokens=4, ignore_eos=True))
    assert [group.id for group in client.rollouts([slow, fast])] == ["fast", "slow"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"groups": []}, 400, "groups"),
        ({"groups": [{"prompt": "a", "n": 0}]}, 400, "groups.0.n"),
        ({"groups": [{"prompt": "a", "sampling": {"top_p": 2}}]}, 400, "groups.0.sampling.top_p"),
        ({"groups": [{"prompt": "a", "sampling": {"max_tokens": 100000}}]}, 400, "groups.0.sampling.max_tokens"),
        ({"groups": [{"prompt": "7" * 600}]}, 400, "groups.0.prompt"),
        ({"groups": [{"prompt_token_ids": [4000]}]}, 400, "groups.0.prompt_token_ids"),
        ({"groups": [{"prompt": "a"}], "model": "other"}, 404, "model"),
        ({"grups": []}, 400, "grups"),
    ],
)
def test_bad_rollout_requests_are_4xx_and_name_the_field(client, body, status, field):
    response = client.http.post("/v1/rollouts", json=body)
    assert response.status_code == status
    assert field in [problem["field"] for problem in response.json()["problems"]]


def test_a_body_over_the_limit_is_refused(client):
    response = client.http.post("/v1/rollouts", content=b" " * (65 << 20), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_openai_routes_are_vllms_own(client):
    assert client.model()["id"] == "demo-policy"
    body = {"model": "demo-policy", "prompt": [10, 11], "max_tokens": 5, "return_token_ids": True, "logprobs": 1}
    choice = client.http.post("/v1/completions", json=body).json()["choices"][0]
    assert len(choice["token_ids"]) <= 5
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
    assert all(isinstance(text, str) and text for text in choice["logprobs"]["tokens"])
    chat = {"model": "demo-policy", "messages": [{"role": "user", "content": "1 + 1 ="}], "max_tokens": 5}
    with client.http.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as response:
        lines = [line for line in response.read().decode().split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk"
    assert client.http.post("/v1/completions", json=body | {"model": "other"}).status_code == 404
    assert client.http.post("/v1/completions", json=body | {"temperature": -1}).status_code == 400
    assert client.http.post("/v1/completions", json=body | {"max_tokens": 10**6}).status_code == 400
    refused = client.http.post("/v1/completions", json=body | {"min_p": 0.1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "min_p")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wrong", [{"top_k": 2**64}, {"stop": ["\ud800"]}, {"bad_words": ["\ud800"]}])
def test_what_cannot_be_sent_to_vllms_core_is_a_wrong_request(client, wrong, stream):
    body = {"model": "demo-policy", "prompt": [10, 11], "max_tokens": 5, "stream": stream} | wrong
    headers = {"Content-Type": "application/json"}
    response = client.http.post("/v1/completions", content=json.dumps(body).encode(), headers=headers)
    if response.status_code == 200:  # a stream sends its status before vLLM reads the request
        assert stream
        event = response.text.removeprefix("data: ").split("\n")[0]
        assert json.loads(event)["error"]["code"] == 400
    else:
        assert response.status_code == 400


def test_sampling_defaults_are_the_services_own_and_are_echoed(client):
    (group,) = client.rollouts([GroupRequest(prompt=PROMPT, n=16, sampling=Sampling(max_tokens=48))])
    assert (group.sampling.temperature, group.sampling.top_p, group.sampling.top_k) == (1.0, 1.0, 0)
    assert len({tuple(c.token_ids) for c in group.completions}) > 1  # the checkpoint's defaults ask for greedy decoding
    body = {"model": "demo-policy", "prompt": PROMPT, "max_tokens": 48, "n": 16, "return_token_ids": True, "top_k": 50}
    response = client.http.post("/v1/completions", json=body)
    assert json.loads(response.headers["x-sampling"]) == {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    assert len({tuple(choice["token_ids"]) for choice in response.json()["choices"]}) > 1


def test_every_path_keeps_the_positions_free_that_a_drafter_looks_ahead(client):
    limit = 512 - (3 + 1)
    assert client.model()["max_model_len"] == limit
    ids = [10] * (limit - 20)
    (group,) = client.rollouts(
        [GroupRequest(prompt_token_ids=ids, sampling=Sampling(max_tokens=20, ignore_eos=True))]
    )  # fmt: skip
    assert len(group.completions[0].token_ids) == 20
    with pytest.raises(RolloutError, match="1 to 20"):
        list(client.rollouts([GroupRequest(prompt_token_ids=ids, sampling=Sampling(max_tokens=21))]))
    body = {"model": "demo-policy", "prompt": ids, "return_token_ids": True, "ignore_eos": True}
    (choice,) = client.http.post("/v1/completions", json=body | {"max_tokens": 20}).json()["choices"]
    assert len(choice["token_ids"]) == 20
    for more in ({"max_tokens": 21}, {"max_tokens": 400}):  # vLLM's own route cuts max_tokens to the room that is left
        (choice,) = client.http.post("/v1/completions", json=body | more).json()["choices"]
        assert len(choice["token_ids"]) == 20
    assert client.http.post("/v1/completions", json=body | {"prompt": [10] * (limit + 1)}).status_code == 400
    full = client.http.post("/v1/completions", json=body | {"prompt": [10] * limit})
    assert full.status_code == 400
    said = f"has {limit} tokens, too many: prompt and response together may have {limit}"
    assert said in full.json()["error"]["message"]
    none = client.http.post("/v1/completions", json=body | {"max_tokens": 0})
    assert "max_tokens must be at least 1, got 0" in none.json()["error"]["message"]


def running(client):
    """The number of requests in the engines, from vLLM's gauges."""
    lines = client.http.get("/metrics").text.split("\n")
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


def test_a_client_that_disconnects_ends_its_generation(client):
    stream = client.rollouts(
        [
            GroupRequest(id="first", prompt=PROMPT, sampling=Sampling(max_tokens=2)),
            *requests(16, 8, max_tokens=450, ignore_eos=True),
        ]
    )
    assert next(stream).id == "first"
    wait_until(lambda: running(client) > 0, 10, "the others are running")
    stream.close()
    wait_until(lambda: running(client) == 0, 15, "their generation has ended")


def generated(client):
    """The number of tokens that the engines have generated, from vLLM's counter."""
    lines = client.http.get("/metrics").text.split("\n")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total{"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": PROMPT, "n": 32}),
        ("/v1/completions", {"prompt": [PROMPT] * 16, "n": 2}),
        ("/v1/completions", {"prompt": PROMPT, "n": 32, "return_rollout_record": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "n": 32}),
        ("/inference/v1/generate", {"token_ids": [10, 11]}),
    ],
)
async def test_a_client_that_leaves_vllms_own_routes_ends_its_generation_within_a_second(client, path, asked, stream):
    before = generated(client)
    length = {"max_tokens": 450, "ignore_eos": True}
    body = {"model": "demo-policy", "stream": stream} | asked
    body |= {"sampling_params": length | {"n": 32}} if "token_ids" in asked else length
    async with httpx.AsyncClient(timeout=60, trust_env=False) as leaving:
        answer = asyncio.create_task(leaving.post(f"{client.http.base_url}{path}", json=body))
        while generated(client) == before:
            await asyncio.sleep(0.05)
        assert not answer.done(), "it came at once: there was nothing to leave"
        answer.cancel()
    await asyncio.sleep(1.0)
    after = generated(client)
    assert before < after < before + 32 * 450 / 2
    await asyncio.sleep(0.5)
    assert generated(client) == after


async def test_the_async_client_does_the_same(service):
    async with AsyncRolloutClient(service) as client:
        groups = [group async for group in client.rollouts(requests(2, 1, max_tokens=4))]
        assert {group.id for group in groups} == {"g0", "g1"}
        assert (await client.weights()).policy.tensors > 0
        assert (await client.speculation()).drafters[0].drafter == "mtp"


def test_engines_run_at_the_services_niceness(service):
    """At Ray's 15, a busy process beside them would take the engines' cores."""
    started = psutil.Process().children(recursive=True)
    cores = [process for process in started if "EngineCore" in " ".join(process.cmdline())]
    assert cores
    assert {process.nice() for process in cores} == {os.nice(0)}


def test_an_idle_connection_outlasts_what_clients_keep_idle(service):
    at = httpx.URL(service)
    connection = http.client.HTTPConnection(at.host, at.port)
    connection.request("GET", "/ping")
    connection.getresponse().read()
    used = connection.sock
    time.sleep(6)  # uvicorn's default is 5, and so is httpx's
    connection.request("GET", "/ping")
    assert connection.getresponse().status == 200
    assert connection.sock is used


def test_speculation_and_metrics_count_the_same_drafts(client):
    before = client.speculation().drafters[0]
    groups = list(client.rollouts(requests(8, 4, max_tokens=48)))
    after = client.speculation().drafters[0]
    records = [c.speculation for g in groups for c in g.completions]
    assert after.accepted - before.accepted == sum(r.accepted for r in records)
    assert after.draft_steps - before.draft_steps == sum(r.draft_steps for r in records)
    assert 1 + (after.accepted - before.accepted) / (after.draft_steps - before.draft_steps) > 2.0
    text = client.http.get("/metrics").text
    counted = next(line for line in text.split("\n") if line.startswith("vllm:spec_decode_num_accepted_tokens_total"))
    assert float(counted.rsplit(" ", 1)[1]) == after.accepted
