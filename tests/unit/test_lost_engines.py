"""Lost engines: an engine dies or is briefly unreachable; which one answers instead, and what its actor does."""

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.exceptions import ActorUnavailableError, RayTaskError

from drafters.registry import DrafterConfig
from rollout_service.config import EngineConfig
from rollout_service.engine.engine import Engine, NotStarted, Started
from rollout_service.engine.loading import DifferentBytes, HalfLoaded, check_all_ranks
from rollout_service.fleet import engine_lives
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.engine_http import Answer
from rollout_service.fleet.engine_lives import EngineLives
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import FleetError, HungUp, Member
from rollout_service.fleet.pausing import Pausing
from rollout_service.http.errors import add_error_handlers
from rollout_service.http.routes import models, openai

JSON, EVENTS = ({"content-type": of} for of in ("application/json", "text/event-stream"))
LOST = ActorUnavailableError("lost", None)
GONE = aiohttp.ServerDisconnectedError()


def in_actor(error):
    """The exception as Ray raises it for an actor's caller."""
    return RayTaskError("f", "a traceback", error).as_instanceof_cause()


class Connections:
    """To an engine that answers with `headers` and `parts`, and raises exceptions among them."""

    def __init__(self, headers, *parts):
        self.headers, self.parts, self.asked, self.closed = headers, parts, 0, asyncio.Event()

    async def ask(self, method, path, headers, body):
        self.asked += 1
        if isinstance(self.headers, Exception):
            raise self.headers
        return Answer(200, self.headers, self.stream() if self.headers is EVENTS else self.parts[0])

    async def stream(self):
        for part in self.parts:
            if part is None:
                await self.closed.wait()
                raise GONE
            if isinstance(part, Exception):
                raise part
            yield part

    async def close(self):
        self.closed.set()


def engine(index, headers=None, *parts, **answers):
    """In service. It answers OpenAI requests with `headers` and `parts`, and other calls with `answers`."""

    async def given(part):
        if isinstance(part, Exception):
            raise part
        return part

    methods = {name: SimpleNamespace(remote=lambda *_, a=answer: given(a)) for name, answer in answers.items()}
    return Member(index, SimpleNamespace(**methods), True, http=Connections(headers, *parts))


@pytest.fixture
def fleet():
    fleet = Fleet.__new__(Fleet)
    EngineLives.__init__(fleet)
    fleet.pausing = Pausing(Controls(fleet.members), asyncio.Lock(), frees_memory=False)
    fleet.key = "the key"
    fleet.config = SimpleNamespace(
        drafter=DrafterConfig(kind="mtp"),
        served_name="demo",
        context_limit=508,
        engine=EngineConfig(),
        engine_timeout=60.0,
    )
    return fleet


def answer(fleet):
    app = FastAPI()
    app.state.fleet, app.state.admission = (
        fleet,
        SimpleNamespace(check_openai=lambda path, fields: None, max_tokens=508),
    )
    app.include_router(openai.router)
    add_error_handlers(app)
    with TestClient(app) as client:
        return client.post("/v1/completions", json={"prompt": "a"})


@pytest.mark.parametrize("lost", [(GONE,), (EVENTS, GONE)])
def test_an_openai_answer_whose_body_has_not_begun_comes_from_another_engine(fleet, lost):
    fleet.members += [engine(0, *lost), engine(1, JSON, b"{}")]
    response = answer(fleet)
    assert (response.status_code, response.content) == (200, b"{}")
    assert [member.in_service for member in fleet.members] == [False, True]
    assert [(member.load, member.tokens) for member in fleet.members] == [(0, 0)] * 2


def test_an_event_stream_that_has_begun_ends_with_an_error_event(fleet):
    fleet.members += [engine(0, EVENTS, b"data: {}\n\n", GONE), engine(1, EVENTS, b"data: again\n\n")]
    events = answer(fleet).text.split("\n\n")
    assert events[0] == "data: {}"
    assert events[1].startswith('data: {"error": {"message": "FleetError: engine 0 died while it answered"')
    assert events[2:] == [""]
    assert [(member.load, member.tokens) for member in fleet.members] == [(0, 0)] * 2


async def test_an_engine_that_was_started_again_is_not_lost_with_the_connections_to_the_one_before(fleet):
    fleet.members.append(engine(0, EVENTS, b"data: {}\n\n", GONE))
    stream = (await fleet.openai("POST", "/", {}, b"")).body
    fleet.members[0].http = Connections(JSON, b"{}")
    with pytest.raises(FleetError, match="engine 0 died while it answered"):
        [part async for part in stream]
    assert fleet.members[0].in_service


async def test_engines_that_die_again_and_again_end_the_attempts_of_an_openai_request(fleet):
    fleet.members += [engine(index, GONE) for index in range(4)]
    with pytest.raises(FleetError, match="died 3 times in a row"):
        await fleet.openai("POST", "/", {}, b"")
    assert sum(member.http.asked for member in fleet.members) == 3


async def test_an_engine_is_not_lost_because_the_front_has_too_many_open_files(fleet):
    full = OSError(errno.EMFILE, "Too many open files")
    fleet.members.append(
        engine(0, aiohttp.ClientConnectorError(SimpleNamespace(host="engine", port=0, ssl=True), full))
    )
    with pytest.raises(FleetError, match="cannot open another connection: Too many open files"):
        await fleet.openai("POST", "/", {}, b"")
    assert fleet.members[0].in_service
    assert (fleet.members[0].load, fleet.members[0].tokens) == (0, 0)


async def test_requests_of_a_session_go_to_one_engine_as_long_as_it_lives(fleet):
    fleet.members += [engine(index, JSON, str(index).encode()) for index in range(3)]

    async def ask(session):
        return int((await fleet.openai("POST", "/", {}, b"", session, tokens=10)).body)

    first = await ask("a")
    for member in fleet.members:
        member.tokens += 15 * (member.index == first)
    assert [await ask("a") for _ in range(3)] == [first] * 3, "although it has the most to do"
    assert await ask("b") != first
    fleet.members[first].leave()
    second = await ask("a")
    fleet.members[first].in_service = True
    assert await ask("a") == second != first


async def test_hanging_up_ends_requests_that_run_and_those_that_wait_for_an_engine(fleet):
    fleet.members.append(engine(0, EVENTS, b"data: {}\n\n", None))
    stream = (await fleet.openai("POST", "/", {}, b"")).body
    assert await anext(stream) == b"data: {}\n\n"
    fleet.members[0].in_service = False
    running, waiting = (asyncio.create_task(each) for each in (anext(stream), fleet.openai("POST", "/", {}, b"")))
    await asyncio.sleep(0)
    await fleet.hang_up()
    for task in (running, waiting):
        with pytest.raises(HungUp):
            await asyncio.wait_for(task, 2)
    assert fleet.members[0].load == 0


def test_the_model_is_described_while_no_engine_is_in_service(fleet):
    app = FastAPI()
    app.state.fleet = fleet
    app.include_router(models.router)
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
    monkeypatch.setattr(engine_lives, "ASK_EVERY", 0.01)
    monkeypatch.setattr(engine_lives, "AGAIN_AFTER", 0.01)
    fleet.pushes = SimpleNamespace(lock=asyncio.Lock())
    fleet.store = SimpleNamespace(sets={}, folder=SimpleNamespace(path=Path("/service")))
    watching = asyncio.create_task(fleet._watch(member))
    async with asyncio.timeout(2), fleet._change:
        await fleet._change.wait()
    watching.cancel()
    return len(killed)


@pytest.mark.parametrize(("check", "kills"), [(in_actor(NotStarted("new")), 0), (LOST, 0), (in_actor(KeyError()), 1)])
async def test_a_new_actor_is_started_and_only_one_that_cannot_answer_is_killed(fleet, monkeypatch, check, kills):
    member = engine(0, check=check, start=Started({}, None, {}, "/socket", "node"))
    assert await watched(fleet, member, monkeypatch) == kills
    assert (member.in_service, member.restarts) == (True, 1)


async def test_a_new_actor_is_paused_before_it_comes_into_service(fleet, monkeypatch):
    await fleet.pausing.pause("keep", clear_cache=False)
    member, asked = engine(0, check=in_actor(NotStarted("new")), start=Started({}, None, {}, "/socket", "node")), []

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
    actor.llm, actor.index = None, 0
    return actor


async def test_an_actor_that_is_started_already_ends_instead_of_loading_a_second_vllm(empty):
    empty.llm = SimpleNamespace()
    with pytest.raises(Ended):
        await empty.start(None)


@pytest.mark.parametrize("method", ["check", "metrics", "speculation", "schedule", "context_acceptance"])
async def test_an_actor_that_is_not_started_says_so(empty, method):
    with pytest.raises(NotStarted):
        await getattr(empty, method)()


def test_every_rank_must_have_read_the_bytes_that_were_sent():
    check_all_ranks(["a", "a"], "a")
    with pytest.raises(DifferentBytes):
        check_all_ranks(["b", "c"], "a")
    with pytest.raises(HalfLoaded, match="on 1 of 2 ranks"):
        check_all_ranks(["a", "b"], "a")
