"""Lost engines: an engine dies or is briefly unreachable; which one answers instead, and what its actor does."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.exceptions import ActorUnavailableError, RayTaskError

from drafters.registry import DrafterConfig
from rollout_service.engine.asgi import ResponseStart
from rollout_service.engine.engine import Engine, NotStarted, Started
from rollout_service.engine.loading import DifferentBytes, HalfLoaded, check_all_ranks
from rollout_service.fleet import fleet as fleet_module
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import FleetError, Member
from rollout_service.fleet.pausing import Pausing
from rollout_service.http.errors import add_error_handlers
from rollout_service.http.routes import openai

JSON, EVENTS = (ResponseStart(200, [("Content-Type", of)]) for of in ("application/json", "text/event-stream"))
LOST = ActorUnavailableError("lost", None)


def in_actor(error):
    """The exception as Ray raises it for an actor's caller."""
    return RayTaskError("f", "a traceback", error).as_instanceof_cause()


def engine(index, *parts, **answers):
    """In service. It answers OpenAI requests with `parts` and other calls with `answers`, and raises exceptions."""

    async def given(part):
        if isinstance(part, Exception):
            raise part
        return part

    async def stream():
        for part in parts:
            yield given(part)

    streaming = SimpleNamespace(remote=lambda *request: stream())
    methods = {name: SimpleNamespace(remote=lambda *_, a=answer: given(a)) for name, answer in answers.items()}
    return Member(index, SimpleNamespace(openai=SimpleNamespace(options=lambda **_: streaming), **methods), True)


@pytest.fixture
def fleet(monkeypatch):
    monkeypatch.setattr("ray.cancel", lambda stream: None)
    fleet = Fleet.__new__(Fleet)
    fleet.members, fleet._change = [], asyncio.Condition()
    fleet.pausing = Pausing(Controls(fleet.members), asyncio.Lock(), frees_memory=False)
    fleet.config = SimpleNamespace(drafter=DrafterConfig(kind="mtp"), served_name="demo", context_limit=508)
    return fleet


def answer(fleet):
    app = FastAPI()
    app.state.fleet, app.state.admission = fleet, SimpleNamespace(check_openai=lambda path, fields: None)
    app.state.stopping = asyncio.Event()
    app.include_router(openai.router)
    add_error_handlers(app)
    with TestClient(app) as client:
        return client.post("/v1/completions", json={"prompt": "a"})


@pytest.mark.parametrize("lost", [LOST, in_actor(NotStarted("new"))])
@pytest.mark.parametrize("before", [(), (JSON,)])
def test_an_openai_answer_whose_body_has_not_begun_comes_from_another_engine(fleet, lost, before):
    fleet.members += [engine(0, *before, lost), engine(1, JSON, b"{}")]
    response = answer(fleet)
    assert (response.status_code, response.content) == (200, b"{}")
    assert [member.in_service for member in fleet.members] == [False, True]
    assert [member.load for member in fleet.members] == [0, 0]


def test_an_event_stream_that_has_begun_ends_with_an_error_event(fleet):
    fleet.members += [engine(0, EVENTS, b"data: {}\n\n", LOST), engine(1, EVENTS, b"data: again\n\n")]
    events = answer(fleet).text.split("\n\n")
    assert events[0] == "data: {}"
    assert events[1].startswith('data: {"error": {"message": "FleetError: engine 0 died while it answered"')
    assert events[2:] == [""]


async def test_any_other_answer_that_has_begun_is_broken_off(fleet):
    fleet.members.append(engine(0, JSON, b"{", LOST))
    with pytest.raises(FleetError, match="died while it answered"):
        [part async for part in fleet.openai("POST", "/", {}, b"")]


def test_an_engine_that_cannot_answer_gives_a_complete_error_answer_in_one_line(fleet):
    fleet.members.append(engine(0, in_actor(IndexError("no such token"))))
    response = answer(fleet)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the engine could not answer: IndexError: no such token"


def test_the_model_is_described_while_no_engine_is_in_service(fleet):
    app = FastAPI()
    app.state.fleet = fleet
    app.include_router(openai.router)
    (model,) = TestClient(app).get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("demo", "model", 508)


@pytest.mark.parametrize("lost", [LOST, in_actor(NotStarted("new"))])
async def test_a_dying_engine_is_left_out_of_counts_and_metrics(fleet, lost):
    dying = dict.fromkeys(("metrics", "speculation", "schedule", "context_acceptance"), lost)
    fleet.members += [
        engine(0, **dying),
        engine(1, metrics="text", speculation=[{"row": 1}], schedule="fixed", context_acceptance={16: [1]}),
    ]
    assert await fleet.metrics() == {1: "text"}
    assert await fleet.speculation() == [{"row": 1}]
    assert await fleet.schedules() == ["fixed"]
    assert await fleet.context_acceptance() == [{16: [1]}]


async def watched(fleet, member, monkeypatch):
    """Watch until the engine is in service again. Returns how often its actor was killed."""
    killed = []
    monkeypatch.setattr("ray.kill", lambda actor, no_restart: killed.append(actor))
    monkeypatch.setattr(fleet_module, "CHECK_EVERY", 0.01)
    fleet.pushes, fleet.store = SimpleNamespace(lock=asyncio.Lock()), SimpleNamespace(sets={})
    fleet.on_started = lambda index: None
    watching = asyncio.create_task(fleet._watch(member))
    async with asyncio.timeout(2), fleet._change:
        await fleet._change.wait()
    watching.cancel()
    return len(killed)


@pytest.mark.parametrize(("check", "kills"), [(in_actor(NotStarted("new")), 0), (LOST, 0), (in_actor(KeyError()), 1)])
async def test_a_new_actor_is_started_and_only_one_that_cannot_answer_is_killed(fleet, monkeypatch, check, kills):
    member = engine(0, check=check, start=Started({}, None, {}))
    assert await watched(fleet, member, monkeypatch) == kills
    assert (member.in_service, member.restarts) == (True, 1)


async def test_a_new_actor_is_paused_before_it_comes_into_service(fleet, monkeypatch):
    await fleet.pausing.pause("keep", clear_cache=False)
    member, asked = engine(0, check=in_actor(NotStarted("new")), start=Started({}, None, {})), []

    async def control(*call):
        asked.append((*call, member.in_service))

    member.actor.control = SimpleNamespace(remote=control)
    await watched(fleet, member, monkeypatch)
    assert asked == [("pause", "keep", False, False)]
    assert member.in_service


class Ended(BaseException):
    pass


@pytest.fixture
def empty(monkeypatch):
    """An actor that was not started."""

    def end(code):
        raise Ended

    monkeypatch.setattr("os._exit", end)
    actor = Engine.__new__(Engine)
    actor.llm, actor.app, actor.index = None, None, 0
    return actor


async def test_an_actor_that_is_started_already_ends_instead_of_loading_a_second_vllm(empty):
    empty.llm = SimpleNamespace()
    with pytest.raises(Ended):
        await empty.start(None, None, None)


@pytest.mark.parametrize("method", ["check", "metrics", "speculation", "schedule", "context_acceptance"])
async def test_an_actor_that_is_not_started_says_so(empty, method):
    with pytest.raises(NotStarted):
        await getattr(empty, method)()
    with pytest.raises(NotStarted):
        await anext(empty.openai("GET", "/", {}, b""))


async def test_the_answer_of_a_dead_core_is_not_passed_on(empty):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"EngineCore encountered an issue"})

    empty.llm, empty.app = SimpleNamespace(errored=True), app
    with pytest.raises(Ended):
        await anext(empty.openai("GET", "/", {}, b""))


def test_every_rank_must_have_read_the_bytes_that_were_sent():
    check_all_ranks(["a", "a"], "a")
    with pytest.raises(DifferentBytes):
        check_all_ranks(["b", "c"], "a")
    with pytest.raises(HalfLoaded, match="on 1 of 2 ranks"):
        check_all_ranks(["a", "b"], "a")
