"""Several Ray nodes: engines on each, pushes to all, and nodes that are killed, frozen and cut off at work.

The nodes have a network each (nodes.py). A test leaves both engines in service.
"""

import threading
from collections import Counter

import pytest
from engines import MODELS, launched, wait_until
from nodes import HAS_NETWORKS, Node, nodes
from over_http import policy_tensors, requests, worst_difference

from rollout_service.client import RolloutClient
from rollout_service.protocol import LeaseRequest, PromptsRequest

pytestmark = pytest.mark.skipif(not HAS_NETWORKS, reason="needs root and iproute2, for networks of its own")

TIMEOUT = 8.0
"""seconds until an engine that does not answer is out of service"""
BACK_WITHIN = 180.0
COUNT = 24


class Running:
    """A service whose two engines are on two nodes."""

    def __init__(self, cluster, client: RolloutClient):
        self.cluster, self.client, self.version = cluster, client, 0

    def push(self) -> int:
        self.version += 1
        changed = policy_tensors()
        changed["lm_head.weight"] *= 1.0 - 0.05 * (self.version % 2)
        self.client.push_weights("policy", changed, self.version)
        return self.version

    def generate(self, during) -> list:
        """COUNT groups; `during` is called a second after they were sent."""
        timer = threading.Timer(1.0, during)
        timer.start()
        groups = list(self.client.rollouts(requests(COUNT, 8, max_tokens=400, ignore_eos=True)))
        assert timer.finished.is_set()
        timer.join()
        return groups

    def node_of_the_second_engine(self) -> Node:
        """The one whose engine answers second, as Ray knows it."""
        return self.cluster.workers[1]

    def both_in_service(self) -> None:
        wait_until(self._is_ready, BACK_WITHIN, "both engines are in service")
        groups = list(self.client.rollouts(requests(8, 2, max_tokens=16)))
        assert {group.engine for group in groups} == {0, 1}
        assert versions(groups) == {self.version}
        places = {engine.node for engine in self.client.engines().engines}
        assert len(places) == 2

    def _is_ready(self) -> bool:
        self.cluster.supervise()
        return self.client.ready()


def versions(groups) -> set[int]:
    return {span.version for group in groups for c in group.completions for span in c.weight_versions}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    with nodes(folder, workers=2) as cluster:
        flags = ("--ray_address", cluster.address, "--engines", "2", "--engine.cores", "1", "--drafter.kind", "none",
                 "--engine_timeout", str(TIMEOUT), "--state", str(folder / "state"))  # fmt: skip
        with launched("--config", "deploy/demo/service.toml", *flags) as (url, _), RolloutClient(url) as client:
            yield Running(cluster, client)


def test_engines_are_spread_over_the_nodes_and_a_push_reaches_both(running):
    running.push()
    running.both_in_service()
    groups = list(running.client.rollouts(requests(8, 2, max_tokens=32)))
    assert {group.engine for group in groups} == {0, 1}
    changed = worst_difference(groups, MODELS / "policy", lambda model: model.lm_head.weight.data.mul_(0.95))
    assert changed < 1e-4


def killed(node):
    node.kill()


def frozen(node):
    node.freeze()


def cut_off(node):
    node.cut_off()


def mended(node, fault):
    """The fault ends. A node that has ended, or that Ray has given up meanwhile, is started again by its supervisor."""
    if fault is frozen:
        node.thaw()
    if fault is cut_off:
        node.connect()


AGAIN = pytest.mark.again


@pytest.mark.parametrize("fault", [pytest.param(killed, marks=AGAIN), pytest.param(frozen, marks=AGAIN), cut_off])
def test_a_node_that_is_lost_while_it_generates_costs_time_only(running, fault):
    running.both_in_service()
    node = running.node_of_the_second_engine()
    groups = running.generate(lambda: fault(node))
    assert Counter(group.id for group in groups) == Counter(f"g{i}" for i in range(COUNT))
    assert versions(groups) == {running.version}
    assert not running.client.ready()
    mended(node, fault)
    running.both_in_service()


@pytest.mark.parametrize("fault", [killed, pytest.param(frozen, marks=AGAIN), pytest.param(cut_off, marks=AGAIN)])
def test_a_push_goes_on_without_a_node_that_is_lost_meanwhile(running, fault):
    running.both_in_service()
    node = running.node_of_the_second_engine()
    fault(node)
    version = running.push()
    assert running.client.weights().policy.version == version
    groups = list(running.client.rollouts(requests(4, 2, max_tokens=16)))
    assert versions(groups) == {version}
    mended(node, fault)
    running.both_in_service()


@pytest.mark.parametrize("fault", [pytest.param(killed, marks=AGAIN), cut_off])
def test_what_is_leased_stays_leased_and_the_rest_is_generated_elsewhere(running, fault):
    running.both_in_service()
    node, run = running.node_of_the_second_engine(), f"run-{fault.__name__}"
    running.client.send_prompts(PromptsRequest(groups=requests(COUNT, 4, max_tokens=200, ignore_eos=True), run=run))
    first = running.client.lease(LeaseRequest(run=run, groups=4, wait=60.0, seconds=600.0))
    fault(node)
    seen = [group.id for group in first.groups]
    while len(seen) < COUNT:
        more = running.client.lease(LeaseRequest(run=run, groups=4, wait=60.0, seconds=600.0))
        assert more.groups
        seen += [group.id for group in more.groups]
        running.client.acknowledge(more.lease)
    running.client.acknowledge(first.lease)
    assert Counter(seen) == Counter(f"g{i}" for i in range(COUNT))
    mended(node, fault)
    running.both_in_service()
