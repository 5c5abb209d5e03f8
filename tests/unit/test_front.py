"""Answers of the HTTP front: the right status, in the route's own form, with the field named."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from front import StubFleet, front

from rollout_service.fleet.member import FleetError
from rollout_service.fleet.pushes import Pushes
from rollout_service.http.app import stop
from rollout_service.lossless import described
from rollout_service.protocol import MAX_VERSION, WeightStatus
from rollout_service.weights.versions import WeightSet

JSON = {"Content-Type": "application/json"}
JSON_ROUTES = ("/v1/rollouts", "/v1/prompts", "/v1/batches/lease", "/v1/batches/x/ack", "/v1/batches/x/extend")
OPENAI_ROUTES = ("/v1/completions", "/v1/chat/completions")
DEEP = b'{"groups": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def error_of(response):
    """The error's message, after a check that the answer has the route's own form."""
    body = response.json()
    if response.request.url.path in OPENAI_ROUTES:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == response.status_code
        return body["error"]["message"]
    assert set(body) == {"error", "problems"}
    return " ".join([body["error"], *(f"{p['field']}: {p['message']}" for p in body["problems"])])


def rollout(**sampling):
    return {"prompt": "a", "sampling": {"max_tokens": 4, **sampling}}


@pytest.fixture
async def service():
    async with front(StubFleet()) as (client, app):
        yield client, app


# --- bodies ---


@pytest.mark.parametrize("path", [*JSON_ROUTES, *OPENAI_ROUTES])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (DEEP, "recursion limit"),
        (b'{"groups": "\\ud800", "stop": "\\ud800"}', "hex escape"),
        (b"9" * 5000, "number out of range"),
    ],
)
async def test_a_body_that_is_not_json_is_refused(service, path, body, words):
    response = await service[0].post(path, content=body, headers=JSON)
    assert response.status_code == 400
    assert "body" in error_of(response)
    assert words in error_of(response)


@pytest.mark.parametrize("path", [*JSON_ROUTES, *OPENAI_ROUTES])
@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, JSON | {"Content-Encoding": "gzip"}], ids=["none", "text", "gzip"]
)
async def test_a_body_without_the_content_type_of_json_is_a_415(service, path, headers):
    response = await service[0].post(path, content=b"{}", headers=headers)
    assert response.status_code == 415
    assert "Content-" in error_of(response)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/rollouts", {"groups": [rollout(stop=[""])]}, "groups.0.sampling.stop.0"),
        ("/v1/rollouts", {"groups": [rollout(top_k=2**64)]}, "groups.0.sampling.top_k"),
        ("/v1/rollouts", {"groups": [rollout(temperature=5)]}, "groups.0.sampling.temperature"),
        ("/v1/rollouts", {"groups": [rollout(temperature=0.001)]}, "groups.0.sampling.temperature"),
        ("/v1/rollouts", {"groups": [rollout(temperature=0) | {"n": 8}]}, "groups.0"),
        ("/v1/rollouts", {"groups": [{"prompt_token_ids": [2**64]}]}, "groups.0.prompt_token_ids.0"),
        ("/v1/rollouts", {"groups": [{"messages": [{"role": "system", "content": "a"}]}]}, "groups.0.messages"),
        ("/v1/rollouts", {"groups": [rollout() | {"id": "1"}, rollout() | {"id": "1"}]}, "groups.1.id"),
        ("/v1/rollouts", {"groups": [rollout() | {"draft_steps": "false"}]}, "groups.0.draft_steps"),
        ("/v1/prompts", {"groups": [rollout(stop=[""]) | {"id": "a"}]}, "groups.0.sampling.stop.0"),
        ("/v1/prompts", {"groups": [rollout() | {"id": "a"}], "max_staleness": 2**63}, "max_staleness"),
        ("/v1/prompts", {"groups": [rollout() | {"id": "a"}], "priority": 2**31}, "priority"),
        ("/v1/batches/lease", {"version": 2**70}, "version"),
        ("/v1/batches/lease", {"max_staleness": MAX_VERSION + 1}, "max_staleness"),
        ("/v1/batches/lease", {"wait": False}, "wait"),
        ("/v1/batches/lease", {"groups": "5"}, "groups"),
        ("/v1/batches/x/extend", {"seconds": 1e9}, "seconds"),
    ],
)
async def test_a_request_that_cannot_be_served_is_a_400_that_names_the_field(service, path, body, field):
    response = await service[0].post(path, json=body)
    assert response.status_code == 400
    assert field in [problem["field"] for problem in response.json()["problems"]]
    assert not service[1].state.fleet.begun


async def test_a_group_without_an_id_has_its_index_and_never_the_id_of_another(service):
    groups = [rollout() | {"id": "1"}, rollout(), rollout() | {"id": "1_"}, rollout(), rollout() | {"id": ""}]
    response = await service[0].post("/v1/rollouts", json={"groups": groups})
    assert sorted(json.loads(line)["id"] for line in response.text.splitlines()) == ["1", "1_", "1__", "3", "4"]


async def test_a_whole_number_written_with_a_point_is_an_integer(service):
    group = {"prompt_token_ids": [1.0, 2], "n": 1.0, "sampling": {"max_tokens": 4.0}}
    response = await service[0].post("/v1/rollouts", json={"groups": [group]})
    assert response.json()["prompt_token_ids"] == [1, 2]
    refused = await service[0].post("/v1/rollouts", json={"groups": [group | {"n": 1.5}]})
    assert [problem["field"] for problem in refused.json()["problems"]] == ["groups.0.n"]


@pytest.mark.parametrize(
    ("metadata", "words"), [(b"NaN", "not JSON compliant"), (b"1e400", "not JSON compliant"), (b"[-Infinity]", "JSON")]
)
async def test_metadata_that_cannot_be_returned_unchanged_is_refused(service, metadata, words):
    body = b'{"groups": [{"prompt": "a", "metadata": {"x": ' + metadata + b"}}]}"
    response = await service[0].post("/v1/rollouts", content=body, headers=JSON)
    assert response.status_code == 400
    assert words in error_of(response)


async def test_a_temperature_that_is_not_a_number_is_refused_as_such(service):
    body = b'{"groups": [{"prompt": "a", "sampling": {"temperature": NaN}}]}'
    response = await service[0].post("/v1/rollouts", content=body, headers=JSON)
    assert response.json()["problems"] == [
        {"field": "groups.0.sampling.temperature", "message": "Input should be a finite number"}
    ]
    body = b'{"prompt": "a", "temperature": NaN}'
    response = await service[0].post("/v1/completions", content=body, headers=JSON)
    assert "NaN and Infinity are not JSON numbers" in error_of(response)


async def test_the_answer_quotes_the_chat_templates_own_error(service):
    for path in ("/v1/rollouts", "/v1/prompts"):
        group = {"id": "a", "messages": [{"role": "system", "content": "a"}]}
        response = await service[0].post(path, json={"groups": [group]})
        assert response.status_code == 400
        assert "System role not supported" in error_of(response)


async def test_a_misspelt_parameter_of_the_query_is_refused(service):
    for method, path in (("DELETE", "/v1/prompts?run=a&rnu=b"), ("GET", "/v1/batches?run=a"), ("GET", "/health?x=1")):
        response = await service[0].request(method, path)
        assert response.status_code == 400
        assert "no such query parameter" in error_of(response)


async def test_the_run_that_weights_belong_to_is_shown_until_it_ends(service):
    client, app = service
    store = SimpleNamespace(sets={"policy": WeightSet("policy", {}, "float32")}, folder=SimpleNamespace(path="/none"))
    store.sets["policy"].status = WeightStatus(version=3, tensors=0, bytes=0, checksum="", run="a")
    app.state.fleet.store, app.state.fleet.pushes = store, Pushes(store, None, None, [])
    assert (await client.get("/v1/weights")).json()["policy"]["run"] == "a"
    assert (await client.delete("/v1/weights?run=b")).json() == {"released": 0}
    assert (await client.delete("/v1/weights?run=a")).json() == {"released": 1}
    assert (await client.get("/v1/weights")).json()["policy"] == store.sets["policy"].status.model_dump()
    assert store.sets["policy"].status.run is None


async def test_the_metrics_give_the_version_in_service_also_after_a_restart(service):
    client, app = service
    app.state.fleet.store.version = lambda of: 7  # no push reached this process
    assert 'rollout_weight_version{of="policy"} 7.0' in (await client.get("/metrics")).text


# --- OpenAI's routes ---


@pytest.mark.parametrize("path", OPENAI_ROUTES)
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tempreature": 0.5}, "tempreature", "did you mean temperature"),
        ({"n": 513}, "n", "1 to 512"),
        ({"top_k": 2**64}, "top_k", "out of range"),
        ({"temperature": 0.001}, "temperature", "0.001 is too low"),
        ({"max_tokens": 2**64}, "max_tokens", "64 bits"),
        ({"prompt": [[1, 2**70]]}, "prompt", "64 bits"),
    ],
)
async def test_what_vllm_would_ignore_or_fail_on_is_refused_in_openais_form(service, path, fields, param, words):
    response = await service[0].post(path, json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["type"] == "BadRequestError"
    assert words in error_of(response)
    assert not service[1].state.fleet.asked


async def test_openai_fields_that_change_nothing_are_accepted(service):
    response = await service[0].post("/v1/completions", json={"prompt": "a", "metadata": {"a": "b"}, "store": False})
    assert response.status_code == 200


async def test_the_echoed_sampling_is_the_accepted_sampling(service):
    given = {"prompt": "a", "temperature": 0.5, "top_p": None}
    response = await service[0].post("/v1/completions", json=given)
    assert json.loads(response.headers["x-sampling"]) == {"temperature": 0.5, "top_p": 1.0, "top_k": 0}
    zero = await service[0].post("/v1/completions", json={"prompt": "a", "temperature": 0})
    assert json.loads(zero.headers["x-sampling"])["temperature"] == 0
    refused = await service[0].post("/v1/completions", json={"prompt": "a", "n": 513})
    assert "x-sampling" not in refused.headers


# --- what no route answers ---


async def test_unknown_paths_and_methods_are_answered_in_the_documented_form(service):
    response = await service[0].get("/v1/nothing")
    assert response.status_code == 404
    assert "/v1/nothing" in error_of(response)
    response = await service[0].request("PATCH", "/v1/completions")
    assert response.status_code == 405
    assert "PATCH" in error_of(response)
    for path, methods in (("/v1/batches", "DELETE, GET"), ("/v1/prompts", "DELETE, POST")):
        assert (await service[0].options(path)).headers["allow"] == methods


async def test_an_unforeseen_error_is_a_complete_answer_in_the_routes_form(service):
    client, app = service
    app.state.background.queue.close()
    response = await client.post("/v1/batches/lease", json={})
    assert response.status_code == 500
    assert "its log has the cause" in error_of(response)

    async def broken(*_):
        raise KeyError("server")

    app.state.fleet.openai = broken
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert "KeyError" in error_of(response)


async def test_head_is_answered_wherever_get_is(service):
    for path in ("/health", "/ready", "/metrics", "/v1/batches"):
        assert (await service[0].head(path)).status_code == 200


# --- the token ---


async def test_a_missing_token_is_answered_with_the_standard_header():
    async with front(StubFleet(token="secret")) as (client, _):
        for given in ("", "secret", "Basic secret", "Bearer wrong", "Bearer sécret"):
            response = await client.get("/v1/batches", headers={"Authorization": given.encode()})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        for scheme in ("Bearer", "bearer", "BEARER"):
            answer = await client.get("/v1/batches", headers={"Authorization": f"{scheme} secret"})
            assert answer.status_code == 200
        assert (await client.get("/health")).status_code == 200
        refused = await client.post("/v1/completions", json={})
        assert refused.json()["error"]["type"] == "UnauthorizedError"


# --- rollouts ---


async def test_a_group_that_fails_has_a_line_and_all_others_are_delivered(service):
    client, app = service
    app.state.fleet.outcomes = {"2": FleetError("refused"), "4": RuntimeError("surprise")}
    groups = [rollout() | {"id": str(i)} for i in range(6)]
    response = await client.post("/v1/rollouts", json={"groups": groups})
    lines = [json.loads(line) for line in response.text.splitlines()]
    failed = {line["group"]: line["error"] for line in lines if "error" in line}
    assert failed.pop("2") == "refused"
    assert "RuntimeError" in failed.pop("4")
    assert not failed
    assert sorted(line["id"] for line in lines if "id" in line) == ["0", "1", "3", "5"]
    assert app.state.telemetry.in_flight._value.get() == 0


async def test_a_stopping_service_says_so_on_every_route(service):
    client, app = service
    app.state.fleet.outcomes = {"slow": 60}
    body = {"groups": [rollout() | {"id": "fast"}, rollout() | {"id": "slow"}]}
    running = asyncio.create_task(client.post("/v1/rollouts", json=body))
    leasing = asyncio.create_task(client.post("/v1/batches/lease", json={"wait": 60}))
    while "fast" not in app.state.fleet.ended:
        await asyncio.sleep(0.01)
    await stop(app)
    response = await asyncio.wait_for(running, 2)
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line.get("id") for line in lines] == ["fast", None]
    assert "1 groups are not finished" in lines[1]["error"]
    assert app.state.fleet.ended == ["fast", "slow"]
    assert app.state.telemetry.in_flight._value.get() == 0
    assert (await asyncio.wait_for(leasing, 3)).status_code == 503
    late = await client.post("/v1/completions", json={"prompt": "a"})
    assert late.status_code == 503
    assert int(late.headers["retry-after"]) > 0
    assert "stopping" in error_of(late)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_answer_ends_in_the_routes_form_when_the_service_stops(service, stream):
    client, app = service
    body = {"prompt": "slow", "stream": stream}
    running = asyncio.create_task(client.post("/v1/completions", json=body))
    while not app.state.fleet.asked:
        await asyncio.sleep(0.01)
    await stop(app)
    response = await asyncio.wait_for(running, 2)
    if stream:
        *_, last, end = response.text.split("\n\n")
        assert end == ""
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
        assert "stopping" in error["message"]
    else:
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert "stopping" in error_of(response)
    assert app.state.fleet.ended, "the engine stops the request"


# --- the document ---


async def test_the_document_names_every_status_that_occurs_and_the_tokens():
    async with front(StubFleet(token="secret")) as (client, _):
        document = (await client.get("/openapi.json", headers={"Authorization": "Bearer secret"})).json()
    schemes = document["components"]["securitySchemes"]
    assert {name: (scheme["type"], scheme["scheme"]) for name, scheme in schemes.items()} == {
        "token": ("http", "bearer"),
        "admin_token": ("http", "bearer"),
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert {"400", "500", "503"} <= set(operation["responses"])
            assert ("401" in operation["responses"]) == (path not in ("/health", "/ping"))
    rollouts = document["paths"]["/v1/rollouts"]["post"]["responses"]["200"]["content"]
    assert list(rollouts) == ["application/x-ndjson"]
    metrics = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert list(metrics) == ["text/plain; version=0.0.4; charset=utf-8"]
    completions = document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert set(completions) == {"application/json", "text/event-stream"}
    assert document["components"]["schemas"]["Sampling"]["properties"]["max_tokens"]["maximum"] == 63


async def test_the_document_says_what_is_refused_as_not_lossless():
    async with front(StubFleet()) as (client, _):
        document = (await client.get("/openapi.json")).json()
    assert described("rollouts") in document["components"]["schemas"]["Sampling"]["description"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert described("openai") in document["paths"][path]["post"]["description"]
