"""Pauses: of one engine by a client and by an update, and of a fleet whose engines die and come back."""

import asyncio
from types import SimpleNamespace

import pytest

from rollout_service.engine.engine import NotStarted
from rollout_service.engine.pausing import EnginePausing
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.member import Member
from rollout_service.fleet.pausing import ALL_MEMORY, Pausing
from rollout_service.transports import RefusedUpdate


class Scheduler:
    """What pauses and resumes in vLLM. A pause with `wait` takes until `idle` is set."""

    def __init__(self):
        self.calls, self.idle, self.asleep = [], asyncio.Event(), set()

    async def pause_generation(self, *, mode, clear_cache):
        self.calls.append(mode)
        if mode == "wait":
            await self.idle.wait()

    async def resume_generation(self):
        self.calls.append("resume")

    async def sleep(self, level, mode):
        self.calls.append(f"sleep {level}")
        self.asleep = set(ALL_MEMORY)

    async def wake_up(self, tags):
        self.asleep -= set(tags)
        return not self.asleep


@pytest.fixture
def scheduler():
    return Scheduler()


@pytest.fixture
def engine(scheduler):
    return EnginePausing(scheduler)


async def update(engine, mode, error=None):
    async with engine.for_an_update() as pause:
        await pause(mode, True)
        if error is not None:
            raise error


async def test_an_update_resumes_the_engine_also_when_it_fails(engine, scheduler):
    await update(engine, "abort")
    with pytest.raises(OSError, match="disk"):
        await update(engine, "keep", OSError("disk"))
    assert scheduler.calls == ["abort", "resume", "keep", "resume"]


@pytest.mark.parametrize("mode", ["wait", "abort", "keep"])
async def test_an_update_in_a_clients_pause_neither_waits_for_frozen_completions_nor_resumes_them(
    engine, scheduler, mode
):
    await engine.pause("keep", False)
    await asyncio.wait_for(update(engine, mode), 1)
    assert scheduler.calls == ["keep", "keep"]
    await engine.resume()
    assert scheduler.calls[-1] == "resume"


async def test_a_pause_that_comes_during_an_update_holds_afterwards(engine, scheduler):
    under_way = asyncio.create_task(update(engine, "wait"))
    await asyncio.sleep(0)
    asked = asyncio.create_task(engine.pause("keep", False))
    await asyncio.sleep(0)
    assert scheduler.calls == ["wait"], "it must not freeze what the update waits for"
    scheduler.idle.set()
    await asyncio.wait_for(asyncio.gather(under_way, asked), 1)
    assert scheduler.calls == ["wait", "keep"]


async def test_a_wake_up_in_parts_ends_the_pause_with_the_last_one(engine):
    await engine.sleep("abort")
    await engine.wake_up(["weights"])
    assert engine.by_client
    await engine.wake_up(["kv_cache"])
    assert not engine.by_client


# --- the fleet ---


def fleet(count=2, frees_memory=False):
    """Pausing over engines whose `calls` are recorded. An engine that is `dead` has not started."""
    members = []
    for index in range(count):
        actor = SimpleNamespace(calls=[], dead=False)

        async def control(what, *arguments, actor=actor):
            if actor.dead:
                raise NotStarted("new")
            actor.calls.append((what, *arguments))

        actor.control = SimpleNamespace(remote=control)
        members.append(Member(index, actor, in_service=True))
    return Pausing(Controls(members), asyncio.Lock(), frees_memory), members


async def test_a_pause_reaches_every_engine_and_a_dead_one_does_not_fail_it():
    pausing, members = fleet()
    members[1].actor.dead = True
    await pausing.pause("keep", False)
    assert pausing.paused
    assert [member.actor.calls for member in members] == [[("pause", "keep", False)], []]


async def test_an_engine_that_starts_takes_the_pause_even_if_it_changes_meanwhile():
    pausing, members = fleet()
    await pausing.pause("wait", True)
    members[1].in_service = False
    stock = members[1].actor.control.remote

    async def control(*call):
        await stock(*call)
        if call[0] == "pause":
            await pausing.resume()  # reaches only engines in service

    members[1].actor.control = SimpleNamespace(remote=control)
    await pausing.catch_up(members[1])
    assert members[1].actor.calls[1:] == [("pause", "wait", True), ("resume",)]


async def test_an_engine_that_starts_without_a_pause_is_left_alone():
    pausing, members = fleet()
    await pausing.catch_up(members[0])
    assert members[0].actor.calls == []


async def test_sleep_where_no_memory_can_be_freed_is_a_pause_until_the_last_part_wakes():
    pausing, (member,) = fleet(1)
    await pausing.sleep("abort")
    pausing.check_awake()  # weights are there
    with pytest.raises(RefusedUpdate, match="wake_up"):
        await pausing.resume()
    assert not await pausing.wake_up(["weights"])
    assert pausing.paused
    assert await pausing.wake_up(["kv_cache"])
    assert not pausing.paused
    assert member.actor.calls == [("pause", "abort", True), ("resume",)]


async def test_engines_that_sleep_take_no_weights_until_these_wake():
    pausing, (member,) = fleet(1, frees_memory=True)
    await pausing.sleep("keep")
    with pytest.raises(RefusedUpdate, match="tags=weights") as refusal:
        pausing.check_awake()
    assert refusal.value.status == 409
    await pausing.wake_up(["weights"])
    pausing.check_awake()
    await pausing.wake_up(None)
    assert member.actor.calls == [("sleep", "keep"), ("wake_up", ["weights"]), ("wake_up", ["kv_cache"])]


async def test_engines_fall_asleep_only_between_pushes():
    pausing, (member,) = fleet(1, frees_memory=True)
    async with pausing.pushing:
        asked = asyncio.create_task(pausing.sleep("keep"))
        await asyncio.sleep(0.01)
        assert member.actor.calls == []
    await asked
    assert member.actor.calls == [("sleep", "keep")]


async def test_an_engine_that_starts_beside_sleeping_ones_sleeps_and_beside_half_awake_ones_only_waits():
    pausing, members = fleet(1, frees_memory=True)
    await pausing.sleep("keep")
    await pausing.catch_up(members[0])
    assert members[0].actor.calls[-1] == ("sleep", "keep")
    await pausing.wake_up(["weights"])
    await pausing.catch_up(members[0])
    assert members[0].actor.calls[-1] == ("pause", "keep", True)
