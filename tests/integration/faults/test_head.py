"""The head of a cluster is killed with the front on it, and started again: the service goes on from its state."""

import threading
from collections import Counter

import pytest
from engines import wait_until
from nodes import HAS_NETWORKS, nodes
from over_http import policy_tensors, requests
from service import Service

from rollout_service.client import RolloutClient
from rollout_service.protocol import LeaseRequest, PromptsRequest

pytestmark = pytest.mark.skipif(not HAS_NETWORKS, reason="needs root and iproute2, for networks of its own")

COUNT, LEASED, RUN = 16, 4, "head"


@pytest.mark.again
def test_after_the_head_is_killed_versions_groups_and_leases_are_what_they_were(tmp_path):
    with nodes(tmp_path, workers=1) as cluster:
        flags = ("--ray_address", cluster.address, "--engine.cores", "1", "--drafter.kind", "none")
        service = Service(tmp_path, *flags)
        service.start()
        try:
            with RolloutClient(service.url) as client:
                client.push_weights("policy", policy_tensors(), 7)
                groups = requests(COUNT, 4, max_tokens=200, ignore_eos=True)
                client.send_prompts(PromptsRequest(groups=groups, run=RUN))
                done = lease(client, seconds=600.0)
                client.acknowledge(done.lease)
                held = lease(client, seconds=600.0)

            cluster.head.kill()
            service.kill()
            cluster.restart_head()
            again = threading.Thread(target=service.start)
            again.start()
            wait_until(lambda: cluster.supervise() or not again.is_alive(), 240, "the service is there again")

            with RolloutClient(service.url) as client:
                assert client.weights().policy.version == 7
                client.acknowledge(held.lease)
                acknowledged = [group.id for batch in (done, held) for group in batch.groups]
                while len(acknowledged) < COUNT:
                    batch = lease(client, seconds=600.0)
                    assert {s.version for g in batch.groups for c in g.completions for s in c.weight_versions} == {7}
                    client.acknowledge(batch.lease)
                    acknowledged += [group.id for group in batch.groups]
                assert Counter(acknowledged) == Counter(f"g{i}" for i in range(COUNT))
                assert client.batches().leased == 0
        finally:
            if service.is_alive:
                service.kill()


def lease(client, seconds):
    batch = client.lease(LeaseRequest(run=RUN, groups=LEASED, wait=60.0, seconds=seconds))
    assert len(batch.groups) == LEASED
    return batch
