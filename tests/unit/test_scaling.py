"""Scaling: engines are added and taken away while the fleet serves, and nothing is lost. No Ray is started."""

import asyncio
from types import SimpleNamespace

import pytest
from front import StubFleet, front
from ray.exceptions import ActorDiedError
from toy_engines import toy_fleet, until

from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import check_arguments
from rollout_service.fleet import resources, scaling
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_room_for_more, engines_that_fit_now
from rollout_service.protocol import EngineStatus, FleetStatus, GroupRequest
from rollout_service.telemetry import Telemetry
from rollout_service.transports import RefusedUpdate, Update

REQUEST = GroupRequest(id="a", prompt_token_ids=[1], n=4)


@pytest.fixture
def cluster(monkeypatch):
    """What the fleet sees of the nodes: `free` engines fit, and nodes of these ids are alive."""
    cluster = SimpleNamespace(free=0, alive={"node 0", "node 1"})
    monkeypatch.setattr(scaling, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(scaling, "engines_that_fit_now", lambda *_: cluster.free)
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": node, "Alive": True} for node in cluster.alive])

    async def check(*_, running, more):
        if more > cluster.free:
            raise FleetError(f"engines: {running + more} engine(s) of 1 core(s) each need more")

    monkeypatch.setattr(scaling, "check_room_for_more", check)
    return cluster


@pytest.fixture
async def fleet(monkeypatch, tmp_path, cluster):
    async with toy_fleet(monkeypatch, tmp_path, engines=2) as fleet:
        yield fleet


def indices(fleet):
    return [member.index for member in fleet.members]


async def test_an_engine_that_is_added_has_the_weights_in_service_before_it_serves(fleet, cluster, tmp_path):
    (tmp_path / "w").touch()
    await fleet.pushes.push("policy", 7, Update(tmp_path / "w", "a" * 64))
    cluster.free = 1
    adding = asyncio.create_task(fleet.scaling.to(3, drain=0.0))
    await until(lambda: len(fleet.members) == 3)
    assert not fleet.members[2].in_service
    assert await fleet.ready(), "the engines that were there before all serve"
    await adding
    assert [(member.in_service, member.actor.held) for member in fleet.members] == [(True, 7)] * 3
    fleet.members[2].actor.freeze()
    await until(lambda: fleet.members[2].restarts == 1, 2.0)  # it is watched like the others


async def test_engines_without_room_are_refused_before_anything_starts(fleet):
    with pytest.raises(RefusedUpdate, match=r"engines: 3 engine\(s\)") as refused:
        await fleet.scaling.to(3, drain=0.0)
    assert refused.value.status == 409
    assert (indices(fleet), fleet.scaling.wanted) == ([0, 1], 2)


async def test_engines_that_cannot_start_leave_the_fleet_as_it_was(fleet, cluster, monkeypatch):
    async def fails(costs):
        raise ActorDiedError()

    made = fleet.make_engine

    def broken():
        member = made()
        member.actor.start = SimpleNamespace(remote=fails)
        return member

    fleet.make_engine, cluster.free = broken, 2
    with pytest.raises(FleetError, match="an engine could not start"):
        await fleet.scaling.to(4, drain=0.0)
    assert (indices(fleet), sorted(fleet._watches), fleet.scaling.wanted) == ([0, 1], [0, 1], 2)


async def test_an_engine_that_is_taken_away_finishes_its_groups_and_gets_no_new_ones(fleet):
    for member in fleet.members:
        member.actor.slow = 0.2
    running = [asyncio.create_task(fleet.generate(REQUEST)) for _ in range(2)]
    await until(lambda: all(member.load for member in fleet.members))
    leaving = fleet.members[1]
    taking = asyncio.create_task(fleet.scaling.to(1, drain=5.0))
    await until(lambda: leaving.draining)
    assert [engine.state for engine in fleet.scaling.status().engines] == ["in service", "draining"]
    assert await fleet.ready()
    later = await fleet.generate(REQUEST)
    groups = await asyncio.gather(*running)
    await taking
    assert later.engine == 0
    assert sorted(group.engine for group in groups) == [0, 1], "what ran there was not begun again"
    assert (indices(fleet), leaving.actor.lives, sorted(fleet._watches)) == ([0], 1, [0])


async def test_what_is_not_finished_in_time_is_generated_elsewhere_and_its_engine_did_not_die(fleet):
    fleet.members[1].actor.slow = 60.0
    fleet.members[0].add_load(1, 10**6)
    group = asyncio.create_task(fleet.generate(REQUEST))
    await until(lambda: fleet.members[1].load)
    await fleet.scaling.to(1, drain=0.1)
    assert (await asyncio.wait_for(group, 1.0)).engine == 0


async def test_an_engine_ends_between_two_pushes(fleet):
    async with fleet.pushes.lock:
        taking = asyncio.create_task(fleet.scaling.to(1, drain=0.0))
        await asyncio.sleep(0.05)
        assert (indices(fleet), fleet.members[1].actor.lives) == ([0, 1], 0)
    await taking
    assert indices(fleet) == [0]


async def test_an_engine_that_is_out_of_service_is_taken_away_first_and_its_index_is_used_again(fleet, cluster):
    fleet.members[0].actor.start = SimpleNamespace(remote=lambda costs: asyncio.sleep(60))
    fleet.members[0].leave()
    await fleet.scaling.to(1, drain=5.0)
    assert indices(fleet) == [1]
    cluster.free = 1
    await fleet.scaling.to(2, drain=5.0)
    assert indices(fleet) == [0, 1]


async def test_a_change_that_comes_during_another_is_refused(fleet, cluster):
    cluster.free = 1
    adding = asyncio.create_task(fleet.scaling.to(3, drain=0.0))
    await asyncio.sleep(0)
    with pytest.raises(RefusedUpdate, match="is being changed already") as refused:
        await fleet.scaling.to(1, drain=0.0)
    assert refused.value.status == 409
    await adding


async def test_with_all_a_node_that_joins_gets_engines_and_one_that_leaves_takes_its_own_away(fleet, cluster):
    fleet.scaling.start()
    await fleet.scaling.to("all", drain=0.0)
    await asyncio.sleep(0.1)
    assert indices(fleet) == [0, 1], "nothing more fits"
    make = fleet.make_engine

    def make_engine():
        cluster.free -= 1
        return make()

    fleet.make_engine, cluster.free = make_engine, 2
    cluster.alive |= {"node 2", "node 3"}
    await until(lambda: [member.in_service for member in fleet.members] == [True] * 4)
    cluster.alive -= {"node 2"}
    gone = fleet.members[2]
    gone.actor.start = SimpleNamespace(remote=lambda costs: asyncio.sleep(60))  # Ray has no room for its new actor
    gone.leave()
    await until(lambda: indices(fleet) == [0, 1, 3])
    assert await fleet.ready(), "the fleet is not broken"


async def test_with_all_the_room_of_an_engine_that_starts_again_is_not_given_away(fleet, cluster):
    await fleet.scaling.to("all", drain=0.0)
    fleet.scaling.start()
    cluster.free = 1  # as Ray says for a moment
    fleet.members[1].actor.kill()
    fleet.members[1].leave()
    await asyncio.sleep(0.08)
    assert not fleet.members[1].in_service
    cluster.free = 0
    await until(lambda: fleet.members[1].in_service)
    await asyncio.sleep(0.1)
    assert indices(fleet) == [0, 1]


def test_all_needs_the_cores_of_an_engine_on_a_cpu():
    config = ServiceConfig(model="never looked for", engines="all", engine={"device": "cpu"})
    with pytest.raises(ValueError, match=r"^engine.cores: engines = 'all' needs the number of cores"):
        Fleet(config)


def test_expert_parallelism_is_refused_on_a_cpu_and_only_there():
    """vLLM 0.32 takes it there. Its kernel gets a rank's own experts and the numbers of all, and the engine dies."""
    config = ServiceConfig(model="never looked for", engine={"vllm": {"enable_expert_parallel": True}, "device": "cpu"})
    with pytest.raises(ValueError, match=r"^engine.vllm.enable_expert_parallel: vLLM's CPU kernel takes every expert"):
        Fleet(config)
    check_arguments(config, "cuda")
    check_arguments(ServiceConfig(model="m", engine={"vllm": {"enable_expert_parallel": False}}), "cpu")


# --- room ---


def service(**more):
    return ServiceConfig(model="m", engines=1, engine={"device": "cpu", "cores": 2}, **more)


async def test_a_machine_without_room_for_more_says_both_numbers(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 5.0}}])
    await check_room_for_more(service(), "cpu", 2, running=1, more=1)
    with pytest.raises(FleetError, match=r"3 engine\(s\) of 2 core\(s\) each need 6, but there are 5 on this machine"):
        await check_room_for_more(service(), "cpu", 2, running=1, more=2)


async def test_a_joined_cluster_is_asked_for_room_for_those_that_are_added(monkeypatch):
    asked = []

    async def check_cluster(config, device, cores):
        asked.append((config.engines, device, cores))

    monkeypatch.setattr(resources, "check_cluster", check_cluster)
    await check_room_for_more(service(ray_address="auto"), "cpu", 2, running=3, more=2)
    assert asked == [(2, "cpu", 2)]


def test_as_many_engines_fit_as_every_node_has_whole_shares_of_each_resource(monkeypatch):
    free = {"a": {"CPU": 5.0}, "b": {"CPU": 1.5, "GPU": 8.0}, "c": {"CPU": 4.0, "GPU": 3.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    assert engines_that_fit_now(service(), "cpu", 2) == 2 + 0 + 2
    wide = ServiceConfig(model="m", engines="all", engine={"device": "cuda", "tensor_parallel_size": 2})
    assert engines_that_fit_now(wide, "cuda", 0) == 0 + 1 + 1


# --- the route ---


class Recorder:
    def __init__(self):
        self.asked = []

    async def to(self, wanted, drain):
        self.asked.append((wanted, drain))

    def status(self):
        engine = EngineStatus(index=0, state="in service", requests=1, tokens_in_flight=9, restarts=0, node="n")
        return FleetStatus(wanted=1, engines=[engine])


@pytest.mark.parametrize(
    ("body", "asked"),
    [({"engines": 3}, (3, 60.0)), ({"engines": "all", "drain": 0}, ("all", 0.0))],
)
async def test_the_route_scales_and_answers_with_the_engines(body, asked):
    fleet = StubFleet()
    fleet.scaling = Recorder()
    async with front(fleet) as (client, _):
        answer = await client.post("/v1/fleet/engines", json=body)
        assert answer.json() == (await client.get("/v1/fleet/engines")).json()
    assert (answer.status_code, fleet.scaling.asked) == (200, [asked])
    assert answer.json()["engines"][0]["tokens_in_flight"] == 9


@pytest.mark.parametrize("body", [{"engines": 0}, {"engines": -1}, {"engines": "three"}, {"engines": 1.5}, {}])
async def test_a_number_that_no_fleet_can_have_is_400_and_names_the_field(body):
    fleet = StubFleet()
    fleet.scaling = Recorder()
    async with front(fleet) as (client, _):
        answer = await client.post("/v1/fleet/engines", json=body)
    assert answer.status_code == 400
    assert {problem["field"].split(".")[0] for problem in answer.json()["problems"]} == {"engines"}
    assert fleet.scaling.asked == []


async def test_the_metrics_count_engines_by_state_and_forget_those_that_were_taken_away(fleet):
    def series():
        lines = telemetry.exposition({}).decode().splitlines()
        return {line for line in lines if line.startswith("rollout_engine") and "created" not in line}

    telemetry = Telemetry()
    fleet.members[1].restarts, fleet.members[1].in_service = 3, False
    telemetry.fleet(fleet.scaling.status())
    engines = {'{state="in service"} 1.0', '{state="starting"} 1.0', '{state="draining"} 0.0'}
    restarts = {'{engine="0"} 0.0', '{engine="1"} 3.0'}
    names = {f"rollout_engines{one}" for one in engines} | {f"rollout_engine_restarts{one}" for one in restarts}
    assert series() == names
    await fleet.scaling.to(1, drain=0.0)
    telemetry.fleet(fleet.scaling.status())
    assert {'rollout_engines{state="starting"} 0.0', 'rollout_engine_restarts{engine="0"} 0.0'} <= series()
    assert not any('engine="1"' in line for line in series())


async def test_a_control_of_the_first_engine_says_so_when_there_is_none(fleet):
    """As with "all" when every node has left."""
    await fleet.scaling._end(list(fleet.members))
    with pytest.raises(FleetError, match="there is no engine; try again when a node has joined"):
        await fleet.controls.of_the_first("open_transfer", {})
