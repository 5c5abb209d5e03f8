"""The batch routes and the background generation over a fleet in miniature."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from rollout_service.background import BackgroundGeneration
from rollout_service.batches import BatchQueue
from rollout_service.client import AsyncRolloutClient, RolloutError
from rollout_service.errors import add_error_handlers
from rollout_service.member import FleetError
from rollout_service.protocol import Completion, Group, GroupRequest, LeaseRequest, PromptsRequest, WeightSpan
from rollout_service.routes import batches
from rollout_service.telemetry import Telemetry


class FleetInMiniature:
    """Generates when `go` is set, with the version in service at the beginning."""

    def __init__(self):
        self.config = SimpleNamespace(engines=1, engine=SimpleNamespace(max_num_seqs=4))
        self.status = SimpleNamespace(version=0)
        self.store = SimpleNamespace(sets={"policy": SimpleNamespace(status=self.status)})
        self.members, self.wasted_tokens, self.pushes = [], 0, SimpleNamespace()
        self.go = asyncio.Event()
        self.begun, self.cancelled, self.failures = [], [], 0

    async def generate(self, group):
        version = self.status.version
        self.begun.append(group.id)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(group.id)
            raise
        if self.failures:
            self.failures -= 1
            raise FleetError("engines died")
        completion = Completion(
            index=0, text="a", token_ids=[1], logprobs=[-1.0], finish_reason="stop",
            weight_versions=[WeightSpan(version=version, start=0, end=1)],
        )  # fmt: skip
        return Group(id=group.id, prompt_token_ids=[1], completions=[completion], sampling=group.sampling, engine=0)

    def publish(self, version):
        self.status.version = version
        self.pushes.on_published("policy", version)


@pytest.fixture
async def service():
    fleet = FleetInMiniature()
    app = FastAPI()
    app.state.stopping = asyncio.Event()
    app.state.background = BackgroundGeneration(fleet, BatchQueue(None, capacity=8, disk_mib=64), Telemetry())
    app.state.admission = SimpleNamespace(admit=lambda request: request.groups)
    app.include_router(batches.router)
    add_error_handlers(app)
    app.state.background.start()
    async with AsyncRolloutClient("http://service") as client:
        client.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
        yield client, fleet
    await app.state.background.stop()


def prompts(*names, **fields):
    return PromptsRequest(groups=[GroupRequest(id=name, prompt_token_ids=[1]) for name in names], **fields)


async def test_groups_are_generated_without_anybody_waiting_and_a_lease_waits_for_as_many_as_it_asks_for(service):
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


async def test_prompts_need_ids_of_their_own(service):
    client, _ = service
    for groups in ([GroupRequest(prompt_token_ids=[1])], prompts("a", "a").groups):
        with pytest.raises(RolloutError) as refused:
            await client.send_prompts(PromptsRequest(groups=groups))
        assert refused.value.status == 400
        assert refused.value.body.problems[0].field.startswith("groups")


async def test_what_can_no_longer_be_fresh_enough_is_ended_counted_and_generated_again(service):
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


async def test_no_more_is_under_way_than_keeps_the_engines_busy(service):
    client, fleet = service
    groups = [GroupRequest(id=f"{i}", prompt_token_ids=[1], n=3) for i in range(6)]
    await client.send_prompts(PromptsRequest(groups=groups))
    await asyncio.sleep(0.05)
    assert len(fleet.begun) == 2, "6 completions for 4 at the same time"
    status = await client.batches()
    assert (status.generating, status.waiting) == (2, 4)


async def test_a_group_whose_engines_died_waits_and_is_generated_again(service):
    client, fleet = service
    fleet.failures = 1
    fleet.go.set()
    await client.send_prompts(prompts("a"))
    batch = await client.lease(LeaseRequest(groups=1, wait=20.0))
    assert [g.id for g in batch.groups] == ["a"]
    assert fleet.begun == ["a", "a"]


async def test_cancelling_a_run_ends_its_generation(service):
    client, fleet = service
    await client.send_prompts(prompts("a", run="one"))
    await client.send_prompts(prompts("b", run="two"))
    await asyncio.sleep(0.05)
    await client.cancel_prompts("one")
    await asyncio.sleep(0.05)
    assert fleet.cancelled == ["a"]
    assert (await client.batches()).generating == 1
