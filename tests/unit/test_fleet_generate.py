"""One group through the fleet: what an engine's answer, refusal, death and cancellation come to; and what watches over
its engines. No Ray is started."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from rollout_service.engine.engine import NotStarted
from rollout_service.fleet.engine_lives import EngineLives
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import EnginesDied, GroupFailed, Member
from rollout_service.protocol import Group, GroupRequest, Sampling


def refusal(cause):
    """The error as an awaited call of an actor raises it."""
    return RayTaskError("generate", "Traceback ...", cause, "ray::Engine", 1, "127.0.0.1").as_instanceof_cause()


class Actor:
    """An engine whose `generate` ends with the next outcome."""

    def __init__(self, *outcomes):
        self.outcomes, self.calls = list(outcomes), 0
        self.generate = SimpleNamespace(remote=self._generate)
        self.abort = SimpleNamespace(remote=lambda key: None)

    async def _generate(self, group, key):
        self.calls += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def fleet(*actors):
    """A fleet that was not started: all members are in service, and restart at once."""
    fleet = object.__new__(Fleet)
    EngineLives.__init__(fleet)
    fleet.members = [Member(i, actor) for i, actor in enumerate(actors)]

    async def engine_for(session, tokens):
        return min(fleet.members, key=lambda member: (not member.in_service, member.tokens))

    fleet._engine_for = engine_for
    for member in fleet.members:
        member.in_service = True
    return fleet


REQUEST = GroupRequest(id="a", prompt_token_ids=[1], n=4)
GROUP = Group(id="a", prompt_token_ids=[1], completions=[], sampling=Sampling(), engine=0)


async def test_a_group_that_an_engine_refuses_fails_at_once_with_its_reason_in_one_line():
    actor = Actor(refusal(ValueError("The prompt\n  is too long")))
    with pytest.raises(GroupFailed) as failed:
        await fleet(actor).generate(REQUEST)
    assert str(failed.value) == "ValueError: The prompt is too long"
    assert actor.calls == 1


async def test_a_reason_is_short_whatever_the_engine_says():
    with pytest.raises(GroupFailed) as failed:
        await fleet(Actor(refusal(ValueError("x" * 10_000)))).generate(REQUEST)
    assert len(str(failed.value)) == 500


async def test_an_engine_that_dies_does_not_count_as_a_refusal():
    here = fleet(Actor(ActorDiedError()), Actor(GROUP))
    assert await here.generate(REQUEST) == GROUP
    assert [member.in_service for member in here.members] == [False, True]


async def test_a_new_actor_that_has_not_started_does_not_count_as_a_refusal():
    here = fleet(Actor(refusal(NotStarted())), Actor(GROUP))
    assert await here.generate(REQUEST) == GROUP
    assert [member.in_service for member in here.members] == [False, True]


async def test_an_answer_that_is_lost_is_asked_for_again():
    actor = Actor(ObjectLostError("00", None, ""), GROUP)
    assert await fleet(actor).generate(REQUEST) == GROUP


async def test_engines_that_die_again_and_again_end_the_attempts():
    actor = Actor(ActorDiedError(), refusal(NotStarted()), ActorDiedError(), GROUP)
    with pytest.raises(EnginesDied, match="group a: its engine died 3 times in a row"):
        await fleet(actor).generate(REQUEST)
    assert actor.calls == 3


@pytest.fixture
def clock(monkeypatch):
    """The members' clock: `clock.now` seconds."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("rollout_service.fleet.member.time", clock)
    return clock


@pytest.mark.parametrize("end", ["finished", "refused", "cancelled"])
async def test_an_engine_counts_as_idle_what_comes_before_and_after_a_group_however_it_ends(end, clock):
    go = asyncio.Event()
    actor = Actor(refusal(ValueError("no")) if end == "refused" else GROUP)
    actor.generate.remote = lambda group, key: after(go, actor._generate(group, key))
    here = fleet(actor)
    (member,) = here.members
    member.idle_since = clock.now
    clock.now += 5.0
    task = asyncio.create_task(here.generate(REQUEST))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (member.load, member.tokens) == (4, 1 + 4 * 256)
    clock.now += 3.0
    assert member.idle_seconds() == 5.0, "idle time does not grow while a group is generated"
    go.set()
    if end == "cancelled":
        task.cancel()
    await asyncio.wait({task})
    assert (member.load, member.tokens, member.idle_seconds()) == (0, 0, 5.0)
    clock.now += 2.0
    assert member.idle_seconds() == 7.0
    if end != "cancelled":
        task.exception()


async def after(event, call):
    await event.wait()
    return await call


async def test_the_watch_of_an_engine_outlives_an_error_of_its_own(monkeypatch, caplog):
    monkeypatch.setattr("rollout_service.fleet.kept_running.AGAIN_AFTER", 0.0)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: Actor()))
    monkeypatch.setattr("ray.remote", lambda _: made)
    here, watched = fleet(), asyncio.Event()
    here.config = SimpleNamespace(
        engines=1, first_engines=1, ray_address=None, for_engine=dict, engine=SimpleNamespace(dtype="float32")
    )
    here.pushes = SimpleNamespace(take_up_kept=lambda: None)
    here.key, here.scaling = "the key", SimpleNamespace(start=lambda: None)
    here.store = SimpleNamespace(folder=SimpleNamespace(path=Path("/service")))
    here.folder, here.device, here.reserved_cores, here.threads = Path(), "cpu", 1, 1
    errors = [OSError("no space left on device")]

    async def in_service(member):
        member.in_service = True

    async def watch(member):
        if errors:
            raise errors.pop()
        watched.set()
        await asyncio.Event().wait()

    here.bring_into_service, here._watch = in_service, watch
    await here.start()
    async with asyncio.timeout(5.0):
        await watched.wait()
    assert "the watch of engine 0 ended with an error; it begins again" in caplog.text
    for task in here._watches.values():
        task.cancel()


async def test_clients_that_leave_while_no_engine_is_in_service_are_cancelled_and_nothing_else():
    """Starlette cancels a request's task again and again until it has ended."""
    lost = fleet(Actor())
    del lost._engine_for
    lost.members[0].in_service = False
    waiting = [asyncio.create_task(lost.generate(REQUEST)) for _ in range(3)]
    await asyncio.sleep(0.01)
    for _ in range(2):
        for task in waiting:
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait(waiting, timeout=5.0)
    assert all(task.cancelled() for task in waiting)
