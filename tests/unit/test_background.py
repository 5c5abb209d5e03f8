"""Batch routes and background generation, over a toy fleet."""

import asyncio
import logging
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from rollout_service.client import AsyncRolloutClient, RolloutError
from rollout_service.fleet.member import EnginesDied, FleetError, GroupFailed
from rollout_service.http.admission import Admission
from rollout_service.http.errors import add_error_handlers
from rollout_service.http.routes import batches
from rollout_service.protocol import Completion, Group, GroupRequest, LeaseRequest, PromptsRequest, WeightSpan
from rollout_service.queue.background import BackgroundGeneration
from rollout_service.queue.batch_queue import BatchQueue
from rollout_service.telemetry import Telemetry


class FleetInMiniature:
    """Generates when `go` is set, with the version that is in service when a group begins."""

    def __init__(self):
        self.config = SimpleNamespace(engines=1, engine=SimpleNamespace(max_num_seqs=4))
        self.status = SimpleNamespace(version=0)
        self.store = SimpleNamespace(version=lambda of: self.status.version)
        self.members = [SimpleNamespace(idle_seconds=lambda: 0.0)]
        self.wasted_tokens, self.pushes = 0, SimpleNamespace()
        self.go = asyncio.Event()
        self.begun, self.cancelled, self.failures = [], [], {}

    async def generate(self, group):
        version = self.status.version
        self.begun.append(group.id)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(group.id)
            raise
        if self.failures.get(group.id):
            raise self.failures[group.id].pop(0)
        completion = Completion(
            index=0, text="a", token_ids=[1], logprobs=[-1.0], finish_reason="stop",
            weight_versions=[WeightSpan(version=version, start=0, end=1)],
        )  # fmt: skip
        return Group(id=group.id, prompt_token_ids=[1], completions=[completion], sampling=group.sampling, engine=0)

    def publish(self, version):
        self.status.version = version
        self.pushes.on_published("policy", version)


@pytest.fixture
async def service(monkeypatch):
    monkeypatch.setattr("rollout_service.queue.background.AGAIN_AFTER", 0.01)
    monkeypatch.setattr("rollout_service.fleet.kept_running.AGAIN_AFTER", 0.01)
    fleet = FleetInMiniature()
    app = FastAPI()
    app.state.stopping = asyncio.Event()
    app.state.background = BackgroundGeneration(fleet, BatchQueue(None, capacity=8, disk_mib=64), Telemetry())
    app.state.admission = Admission("demo", None, vocab_size=128, context_limit=512, drafting=False, openai_fields={})
    app.include_router(batches.router)
    add_error_handlers(app)
    app.state.background.start()
    async with AsyncRolloutClient("http://service") as client:
        client.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
        fleet.background = app.state.background
        yield client, fleet
    await app.state.background.stop()


def prompts(*names, **fields):
    return PromptsRequest(groups=[GroupRequest(id=name, prompt_token_ids=[1]) for name in names], **fields)


async def test_groups_are_generated_without_a_waiting_client_and_a_lease_waits_for_the_number_it_asks_for(service):
    client, fleet = service
    await client.send_prompts(prompts("a", "b"))
    waiting = asyncio.create_task(client.lease(LeaseRequest(groups=2, wait=20.0)))
    await asyncio.sleep(0.05)
    assert fleet.begun == ["a", "b"]
    fleet.go.set()
    batch = await waiting
    assert ([g.id for g in batch.groups], batch.short) == (["a", "b"], None)
    assert (await client.acknowledge(batch.lease)).groups == ["a", "b"]
    assert (await client.batches()).acknowledged == 2


async def test_a_short_batch_says_why(service):
    client, _ = service
    await client.send_prompts(prompts("a"))
    batch = await client.lease(LeaseRequest(groups=2, wait=0.05))
    assert (batch.lease, batch.groups) == (None, [])
    assert batch.short == "0 of 2 groups; 1 are waiting or being generated"


async def test_a_full_queue_answers_429_with_retry_after_and_a_lost_lease_404(service):
    client, _ = service
    with pytest.raises(RolloutError) as full:
        await client.send_prompts(prompts(*"abcdefghi"))
    assert (full.value.status, full.value.retry_after) == (429, 5.0)
    with pytest.raises(RolloutError) as unknown:
        await client.acknowledge("nothing")
    assert unknown.value.status == 404


async def test_prompts_need_unique_ids(service):
    client, _ = service
    nameless = [GroupRequest(prompt_token_ids=[1])]
    for groups, field in ((nameless, "groups.0.id"), (prompts("a", "b", "a").groups, "groups.2.id")):
        with pytest.raises(RolloutError) as refused:
            await client.send_prompts(PromptsRequest(groups=groups))
        assert refused.value.status == 400
        assert [problem.field for problem in refused.value.body.problems] == [field]
    assert (await client.batches()).waiting == 0


async def test_an_id_that_comes_again_with_another_prompt_is_a_conflict_that_names_it(service):
    client, _ = service
    await client.send_prompts(prompts("a"))
    other = GroupRequest(id="a", prompt_token_ids=[2])
    with pytest.raises(RolloutError) as refused:
        await client.send_prompts(PromptsRequest(groups=[*prompts("b").groups, other]))
    assert refused.value.status == 409
    assert [problem.field for problem in refused.value.body.problems] == ["groups.1.id"]
    assert (await client.send_prompts(prompts("a"))).known == 1
    status = await client.batches()
    assert status.waiting + status.generating == 1, "the queue takes no part of a refused request"


async def test_groups_that_became_too_old_are_ended_counted_and_generated_again(service):
    client, fleet = service
    await client.send_prompts(prompts("tight", max_staleness=1))
    await client.send_prompts(prompts("loose", max_staleness=5))
    await asyncio.sleep(0.05)
    fleet.publish(2)
    await asyncio.sleep(0.05)
    assert fleet.cancelled == ["tight"]
    assert fleet.begun == ["tight", "loose", "tight"]
    fleet.go.set()
    batch = await client.lease(LeaseRequest(groups=2, wait=20.0))
    assert {g.id: g.completions[0].weight_versions[0].version for g in batch.groups} == {"tight": 2, "loose": 0}
    assert (await client.batches()).dropped == 1


async def test_no_more_groups_run_than_keep_the_engines_busy(service):
    client, fleet = service
    groups = [GroupRequest(id=f"{i}", prompt_token_ids=[1], n=3) for i in range(6)]
    await client.send_prompts(PromptsRequest(groups=groups))
    await asyncio.sleep(0.05)
    assert len(fleet.begun) == 2, "6 completions are running where 4 can run at the same time"
    status = await client.batches()
    assert (status.generating, status.waiting) == (2, 4)


async def test_a_group_whose_engines_died_waits_and_is_generated_again(service):
    client, fleet = service
    fleet.failures = {"a": [EnginesDied("its engine died")]}
    fleet.go.set()
    await client.send_prompts(prompts("a"))
    batch = await client.lease(LeaseRequest(groups=1, wait=20.0))
    assert [g.id for g in batch.groups] == ["a"]
    assert fleet.begun == ["a", "a"]


async def test_a_group_that_an_engine_refuses_is_tried_once_counted_and_handed_out_as_failed(service, caplog):
    client, fleet = service
    fleet.failures = {"bad": [GroupFailed("ValueError: too long")] * 9}
    fleet.go.set()
    await client.send_prompts(prompts("bad", "good"))
    batch = await client.lease(LeaseRequest(groups=2, wait=20.0))
    assert [g.id for g in batch.groups] == ["good"]
    assert [(g.id, g.error) for g in batch.failed] == [("bad", "ValueError: too long")]
    await asyncio.sleep(0.1)
    assert fleet.begun == ["bad", "good"]
    assert "rollout_groups_failed_total 1.0" in fleet.background.telemetry.exposition({}).decode()
    assert caplog.text.count("group bad failed and is not tried again: ValueError: too long") == 1


async def test_a_group_that_kills_every_engine_fails_after_some_rounds_and_its_neighbours_do_not(service):
    client, fleet = service
    died = EnginesDied("its engine died 3 times in a row")
    fleet.failures = {"deadly": [died] * 9, "beside": [died]}
    fleet.go.set()
    await client.send_prompts(prompts("deadly", "beside"))
    batch = await client.lease(LeaseRequest(groups=2, wait=20.0))
    assert [g.id for g in batch.groups] == ["beside"]
    assert [g.error for g in batch.failed] == ["its engine died 3 times in a row, in each of 3 rounds"]
    assert fleet.begun.count("deadly") == 3


async def test_groups_whose_engines_died_are_tried_again_one_at_a_time(service):
    client, fleet = service
    fleet.failures = {name: [EnginesDied("its engine died")] for name in "ab"}
    fleet.go.set()
    await client.send_prompts(prompts("a", "b"))
    while len(fleet.begun) < 2:
        await asyncio.sleep(0.001)
    fleet.go.clear()
    await asyncio.sleep(0.1)
    assert len(fleet.begun) == 3
    await client.send_prompts(prompts("c"))
    await asyncio.sleep(0.05)
    assert fleet.begun[3:] == ["c"], "others do not wait for them"


async def test_a_group_does_not_fail_because_no_engine_comes_into_service(service):
    client, fleet = service
    fleet.failures = {"a": [FleetError("no engine has come into service")] * 9}
    fleet.go.set()
    await client.send_prompts(prompts("a"))
    batch = await client.lease(LeaseRequest(groups=1, wait=20.0))
    assert ([g.id for g in batch.groups], batch.failed) == (["a"], [])


async def test_an_unexpected_error_fails_only_its_own_group(service, caplog):
    client, fleet = service
    fleet.failures = {"a": [KeyError("a fault of the service")] * 9}
    fleet.go.set()
    await client.send_prompts(prompts("a", "b"))
    batch = await client.lease(LeaseRequest(groups=2, wait=20.0))
    assert [g.id for g in batch.groups] == ["b"]
    assert [g.error for g in batch.failed] == ["KeyError: 'a fault of the service'"]
    assert "Traceback" in caplog.text


async def test_a_failure_that_leaves_a_batch_incomplete_is_reported_at_once(service):
    client, fleet = service
    fleet.failures = {"bad": [GroupFailed("no")]}
    fleet.go.set()
    await client.send_prompts(prompts("bad"))
    async with asyncio.timeout(5.0):
        batch = await client.lease(LeaseRequest(groups=1, wait=600.0))
    assert batch.lease is not None
    assert (batch.groups, [g.id for g in batch.failed]) == ([], ["bad"])
    assert (await client.acknowledge(batch.lease)).groups == ["bad"]


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_group_that_is_cancelled_at_any_moment_leaves_room_for_others(service, steps):
    client, fleet = service
    background = fleet.background
    fleet.config.engine.max_num_seqs = 2  # so that there is room for one group
    await background.stop()
    groups = [GroupRequest(id=name, prompt_token_ids=[1], n=4) for name in "ab"]
    background.queue.add(PromptsRequest(groups=groups[:1]), groups[:1])
    background._begin(background.queue.next_waiting())
    for _ in range(steps):
        await asyncio.sleep(0)
    assert background.cancel("") == (1, 1)
    background.start()
    fleet.go.set()
    await client.send_prompts(PromptsRequest(groups=groups[1:]))
    batch = await client.lease(LeaseRequest(groups=1, wait=5.0))
    assert [g.id for g in batch.groups] == ["b"]
    assert (await client.batches()).generating == 0
    assert background.running == {}


async def test_background_generation_logs_an_error_and_goes_on(service, caplog):
    client, fleet = service
    finished = fleet.background.queue.finished
    expire_leases = finished.expire_leases

    def fails_once():
        finished.expire_leases = expire_leases
        raise KeyError("unexpected")

    finished.expire_leases = fails_once
    fleet.go.set()
    with caplog.at_level(logging.ERROR):
        await client.send_prompts(prompts("a"))
        batch = await client.lease(LeaseRequest(groups=1, wait=5.0))
    assert [g.id for g in batch.groups] == ["a"]
    assert "background generation ended with an error; it begins again" in caplog.text


async def test_a_stored_request_that_cannot_be_read_is_reported_and_background_generation_goes_on(service, caplog):
    client, fleet = service
    queue = fleet.background.queue
    await fleet.background.stop()
    queue.add(prompts("bad"), prompts("bad").groups)
    queue.database.execute("UPDATE requests SET body = '{}'")
    fleet.background.start()
    fleet.go.set()
    await client.send_prompts(prompts("good"))
    batch = await client.lease(LeaseRequest(groups=2, wait=5.0))
    assert ([g.id for g in batch.groups], [g.id for g in batch.failed]) == (["good"], ["bad"])
    assert "group bad failed and is not tried again: the stored request cannot be read" in caplog.text
    assert "rollout_groups_failed_total 1.0" in fleet.background.telemetry.exposition({}).decode()


async def test_forgetting_a_run_says_how_many_groups_it_had_and_how_many_were_being_generated(service):
    client, fleet = service
    fleet.go.set()
    await client.send_prompts(prompts("leased", "finished"))
    await asyncio.sleep(0.05)
    await client.lease(LeaseRequest(groups=1))
    fleet.go.clear()
    await client.send_prompts(PromptsRequest(groups=[GroupRequest(id="long", prompt_token_ids=[1], n=9)]))
    await client.send_prompts(prompts("waiting"))
    await asyncio.sleep(0.05)
    answer = await client.http.delete("/v1/prompts", params={"run": ""})
    assert answer.json() == {"forgotten": 4, "ended": 1}
    assert (await client.http.delete("/v1/prompts", params={"run": ""})).json() == {"forgotten": 0, "ended": 0}


async def test_cancelling_a_run_ends_its_generation(service):
    client, fleet = service
    await client.send_prompts(prompts("a", run="one"))
    await client.send_prompts(prompts("b", run="two"))
    await asyncio.sleep(0.05)
    await client.cancel_prompts("one")
    await asyncio.sleep(0.05)
    assert fleet.cancelled == ["a"]
    assert (await client.batches()).generating == 1
