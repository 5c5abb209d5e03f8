"""A joined cluster without room for the engines: the start is refused in time, or goes on once there is room."""

import asyncio
import time
from collections.abc import Iterator

import pytest
import ray
from engines import MODELS
from ray.cluster_utils import Cluster

from rollout_service.config import ServiceConfig
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One node with one core. The test is its driver."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def service(ray_timeout, **more):
    engine = {"device": "cpu", "cores": 1}
    return ServiceConfig(
        model=str(MODELS / "policy"), engine=engine, ray_address="auto", ray_timeout=ray_timeout, **more
    )


async def test_a_fleet_that_finds_no_room_in_time_says_both_numbers_and_what_to_lower(cluster):
    fleet = Fleet(service(1.0, engines=3))
    began = time.monotonic()
    with pytest.raises(FleetError) as refused:
        await fleet.start()
    await fleet.stop()
    assert time.monotonic() - began < 10.0
    assert str(refused.value) == (
        "engines, engine.cores: 3 engine(s) of 1 core(s) each need 3, but there are 1 in the cluster, also after 1 s; "
        "lower engines or engine.cores, or raise ray_timeout if the cluster grows"
    )


async def test_a_cluster_that_others_use_is_waited_for_as_long_as_ray_timeout_says(cluster, caplog):
    class Other:
        def hello(self):
            return 1

    other = ray.remote(Other).options(num_cpus=1).remote()
    assert await other.hello.remote() == 1
    with pytest.raises(FleetError, match=r"need 1, but only 0 are free in the cluster, also after 1 s; lower engines"):
        await check_cluster(service(1.0), "cpu", cores=1)
    waiting = asyncio.create_task(check_cluster(service(60.0), "cpu", cores=1))
    await asyncio.sleep(3.0)
    assert not waiting.done()
    ray.kill(other)
    await asyncio.wait_for(waiting, 20.0)
    assert "but only 0 are free in the cluster; waiting 60 s for room" in caplog.text


async def test_a_cluster_that_grows_in_time_has_room(cluster):
    waiting = asyncio.create_task(check_cluster(service(60.0, engines=2), "cpu", cores=1))
    await asyncio.sleep(3.0)
    assert not waiting.done()
    cluster.add_node(num_cpus=1)
    await asyncio.wait_for(waiting, 20.0)
    assert await freed(), "the room is kept, and no engine would find it"


async def freed() -> bool:
    """Whether the room that was asked for is given back, which Ray does a moment later."""
    for _ in range(50):
        if ray.available_resources().get("CPU") == 2.0:
            return True
        await asyncio.sleep(0.1)
    return False
