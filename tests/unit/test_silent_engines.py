"""Silent engines: frozen, or cut off. They go out of service in time, and nothing waits for them. No Ray is started."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from toy_engines import toy_fleet, until

from rollout_service.engine.engine import Started
from rollout_service.fleet.member import EnginesDied, FleetError
from rollout_service.protocol import GroupRequest
from rollout_service.transports import Update

TIMEOUT = 0.4
REQUEST = GroupRequest(id="a", prompt_token_ids=[1], n=4)


@pytest.fixture
async def fleet(monkeypatch, tmp_path):
    async with toy_fleet(monkeypatch, tmp_path, engines=2, timeout=TIMEOUT) as fleet:
        yield fleet


async def test_a_frozen_engine_goes_out_of_service_in_time_and_comes_back_once_it_is_killed(fleet, caplog):
    frozen, other = fleet.members
    frozen.actor.freeze()
    began = time.monotonic()
    await until(lambda: not frozen.in_service)
    assert time.monotonic() - began < 1.2 * TIMEOUT
    await until(lambda: frozen.in_service)
    assert (frozen.actor.lives, frozen.restarts, other.actor.lives) == (1, 1, 0)
    assert "engine 0 did not answer within" in caplog.text


async def test_its_groups_are_generated_elsewhere_and_what_it_says_when_it_wakes_is_not_delivered(fleet, monkeypatch):
    """Here `ray.kill` does not reach it before it wakes."""
    monkeypatch.setattr("ray.kill", lambda actor, no_restart: None)
    frozen, _ = fleet.members
    task = asyncio.create_task(fleet.generate(REQUEST))
    await until(lambda: frozen.load)
    frozen.actor.freeze()
    group = await asyncio.wait_for(task, 3 * TIMEOUT)
    assert group.engine == 1
    assert (frozen.load, frozen.tokens) == (0, 0)
    frozen.actor.wake()
    await asyncio.sleep(0.05)
    assert [member.load for member in fleet.members] == [0, 0]
    assert fleet.wasted_tokens == 0


async def test_engines_that_all_fall_silent_count_as_deaths_of_the_group(fleet):
    async def generate(group, key):
        await asyncio.Event().wait()

    for member in fleet.members:
        member.actor.generate = SimpleNamespace(remote=generate)

    async def freeze_in_turns():
        while True:
            for member in fleet.members:
                if member.load:
                    member.actor.freeze()
            await asyncio.sleep(0.01)

    freezing = asyncio.create_task(freeze_in_turns())
    with pytest.raises(EnginesDied):
        await asyncio.wait_for(fleet.generate(REQUEST), 100 * TIMEOUT)
    freezing.cancel()


async def test_an_engine_that_is_slow_but_answers_stays_in_service(fleet):
    member = fleet.members[0]
    for _ in range(4):
        member.actor.freeze()
        await asyncio.sleep(0.5 * TIMEOUT)
        member.actor.wake()
        await asyncio.sleep(0.02)
        assert member.in_service
    assert member.actor.lives == 0


async def test_an_engine_that_loads_weights_may_be_silent_for_longer(fleet):
    member = fleet.members[0]
    with member.busy(4 * TIMEOUT):
        member.actor.freeze()
        await asyncio.sleep(2.5 * TIMEOUT)
        assert member.in_service
        member.actor.wake()
    await asyncio.sleep(0.5 * TIMEOUT)
    assert member.in_service
    member.actor.freeze()
    await until(lambda: not member.in_service, 1.2 * TIMEOUT)


async def test_a_push_does_not_wait_for_a_frozen_engine_which_then_loads_what_was_published(fleet, tmp_path):
    (tmp_path / "w").touch()
    frozen, other = fleet.members
    frozen.actor.freeze()
    status = await asyncio.wait_for(fleet.pushes.push("policy", 7, Update(tmp_path / "w", "a" * 64)), 3 * TIMEOUT)
    assert (status.version, other.actor.held, other.in_service) == (7, 7, True)
    assert not frozen.in_service
    await until(lambda: frozen.in_service)
    assert (frozen.actor.held, frozen.actor.lives) == (7, 1), "it was killed once, not by the push as well"


async def test_a_push_that_no_engine_survives_is_not_published(fleet, tmp_path):
    (tmp_path / "w").touch()
    for member in fleet.members:
        member.actor.freeze()
    with pytest.raises(FleetError, match="no engine could load policy version 7"):
        await asyncio.wait_for(fleet.pushes.push("policy", 7, Update(tmp_path / "w", "a" * 64)), 3 * TIMEOUT)
    await until(lambda: all(member.in_service for member in fleet.members))
    assert [member.actor.held for member in fleet.members] == [None, None]


async def test_an_engine_that_falls_silent_while_it_comes_back_holds_up_no_push(fleet, tmp_path):
    (tmp_path / "v").touch()
    (tmp_path / "w").touch()
    await fleet.pushes.push("policy", 7, Update(tmp_path / "v", "a" * 64))
    again, other = fleet.members
    load = again.actor.load.remote

    async def falls_silent(*arguments):
        again.actor.load = SimpleNamespace(remote=load)
        again.actor.freeze()
        return await load(*arguments)

    again.actor.load = SimpleNamespace(remote=falls_silent)
    again.actor.kill()
    again.leave()
    await until(fleet.pushes.lock.locked)
    status = await asyncio.wait_for(fleet.pushes.push("policy", 8, Update(tmp_path / "w", "b" * 64)), 3 * TIMEOUT)
    assert (status.version, other.actor.held) == (8, 8)
    await until(lambda: again.in_service)
    assert again.actor.held == 8


async def test_an_engine_that_starts_again_does_not_hold_up_a_push_before_it_loads(fleet, tmp_path):
    """The start of a large model takes minutes."""
    (tmp_path / "w").touch()
    again, other = fleet.members
    go = asyncio.Event()

    async def start(costs):
        await go.wait()
        return Started({}, None, {}, "/socket", "node")

    again.actor.start = SimpleNamespace(remote=start)
    again.actor.kill()
    again.leave()
    await asyncio.sleep(2.0 * TIMEOUT)
    await asyncio.wait_for(fleet.pushes.push("policy", 7, Update(tmp_path / "w", "a" * 64)), TIMEOUT)
    assert not again.in_service
    go.set()
    await until(lambda: again.in_service)
    assert again.actor.held == other.actor.held == 7


async def test_a_pause_and_a_count_do_not_wait_for_a_frozen_engine(fleet, monkeypatch):
    monkeypatch.setattr("rollout_service.fleet.fleet.ANSWER_WITHIN", 0.1)
    fleet.members[0].actor.freeze()
    assert await fleet.metrics() == {1: "text"}
    await asyncio.wait_for(fleet.pausing.pause("keep", False), 3 * TIMEOUT)
    assert [member.in_service for member in fleet.members] == [False, True]
    await until(lambda: fleet.members[0].in_service)
    assert "_control" in fleet.members[0].actor.asked, "it takes the pause before it serves"
