"""Nodes that join and leave: with `engines = "all"` they bring their engines and take them away."""

import asyncio
from collections.abc import Iterator

import pytest
import ray
from engines import MODELS
from over_http import policy_tensors
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from rollout_service.config import ServiceConfig
from rollout_service.fleet.fleet import Fleet
from rollout_service.protocol import GroupRequest, Sampling
from rollout_service.tensor_bytes import file_checksum
from rollout_service.transports import Update

START_WITHIN = 240.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One node with one core. The test is its driver."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


async def until(condition, within=START_WITHIN):
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.2)


async def test_a_node_that_joins_gets_an_engine_and_takes_it_away_when_it_leaves(cluster):
    engine = {"device": "cpu", "cores": 1, "dtype": "float32", "max_model_len": 128, "kv_cache_gib": 0.1}
    fleet = Fleet(ServiceConfig(model=str(MODELS / "policy"), engines="all", engine=engine, ray_address="auto"))
    try:
        await fleet.start()
        assert [member.index for member in fleet.members] == [0]
        file = fleet.store.folder.new_file()
        save_file(policy_tensors(), file)
        await fleet.pushes.push("policy", 5, Update(file, file_checksum(file)))
        node = cluster.add_node(num_cpus=1)
        await until(lambda: [member.in_service for member in fleet.members] == [True, True])
        first, second = fleet.members
        assert first.node != second.node
        sampling = Sampling(max_tokens=100, ignore_eos=True)
        requests = [GroupRequest(id=str(i), prompt_token_ids=[1, 2], n=8, sampling=sampling) for i in range(16)]
        groups = [asyncio.create_task(fleet.generate(request)) for request in requests]
        await until(lambda: second.load > 0, 10.0)
        await asyncio.to_thread(cluster.remove_node, node)
        done = await asyncio.gather(*groups)
        assert sorted(int(group.id) for group in done) == list(range(16))
        assert {span.version for g in done for c in g.completions for span in c.weight_versions} == {5}
        await until(lambda: [member.index for member in fleet.members] == [0], 60.0)
        assert await fleet.ready(), "the fleet is not broken"
        assert fleet.scaling.status().wanted == "all"
    finally:
        await fleet.stop()
