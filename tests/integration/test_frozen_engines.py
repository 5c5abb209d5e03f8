"""Frozen engines: SIGSTOP while they generate, of vLLM's core process and of the actor. Every group is delivered."""

import signal
import threading
import time

import psutil
import pytest
from engines import launched, wait_until
from over_http import policy_tensors, requests

from rollout_service.client import RolloutClient

TIMEOUT = 8.0
FLAGS = (
    "--config", "deploy/demo/service.toml", "--drafter.kind", "none", "--engines", "2",
    "--engine_timeout", str(TIMEOUT),
)  # fmt: skip


def process_of_an_engine(service, name):
    """The newest process of this kind, and the processes below it."""
    children = [c for c in psutil.Process(service.pid).children(recursive=True) if name in " ".join(c.cmdline())]
    return max(children, key=lambda child: child.create_time())


@pytest.fixture(scope="module")
def service():
    with launched(*FLAGS) as (url, process), RolloutClient(url) as client:
        client.push_weights("policy", policy_tensors(), 5)
        yield client, process


@pytest.mark.parametrize("frozen", ["EngineCore", pytest.param("ray::Engine", marks=pytest.mark.again)])
def test_a_frozen_engine_loses_its_groups_to_the_other_and_comes_back_with_the_weights_in_service(service, frozen):
    client, process = service
    victim = process_of_an_engine(process, frozen)
    frozen_at = []

    def freeze():
        victim.send_signal(signal.SIGSTOP)
        frozen_at.append(time.monotonic())

    threading.Timer(1.0, freeze).start()
    groups, killed_after = [], []

    def watch():
        while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
        killed_after.append(time.monotonic() - frozen_at[0])

    watching = threading.Thread(target=watch)
    watching.start()
    for group in client.rollouts(requests(24, 8, max_tokens=400, ignore_eos=True)):
        groups.append(group)
    assert frozen_at, "everything was generated before an engine could be frozen"
    assert sorted(group.id for group in groups) == sorted({group.id for group in groups})
    assert len(groups) == 24
    assert {span.version for g in groups for c in g.completions for span in c.weight_versions} == {5}
    watching.join(TIMEOUT + 30.0)
    assert killed_after, "the frozen process lives on"
    assert killed_after[0] < TIMEOUT + 10.0, "Ray takes some five seconds to kill what does not answer"
    wait_until(client.ready, 120, "the engine is in service again")
    again = list(client.rollouts(requests(8, 2, max_tokens=16)))
    assert {group.engine for group in again} == {0, 1}
    assert {span.version for g in again for c in g.completions for span in c.weight_versions} == {5}


def test_a_push_does_not_wait_for_an_engine_that_is_frozen_meanwhile(service):
    client, process = service
    wait_until(client.ready, 120, "both engines are in service")
    victim = process_of_an_engine(process, "EngineCore")
    victim.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert client.push_weights("policy", policy_tensors(), 6).version == 6
    assert time.monotonic() - began < TIMEOUT + 5.0
    wait_until(client.ready, 120, "the engine is in service again")
    groups = list(client.rollouts(requests(8, 2, max_tokens=16)))
    assert {group.engine for group in groups} == {0, 1}
    assert {span.version for g in groups for c in g.completions for span in c.weight_versions} == {6}


@pytest.mark.again
def test_a_frozen_rank_of_an_engine_is_noticed_ended_and_its_groups_are_generated_again(tmp_path):
    """One engine of two ranks. The rank that is frozen holds the other in their next sum."""
    flags = ("--config", "deploy/demo/service.toml", "--drafter.kind", "none", "--engine_timeout", str(TIMEOUT))
    with launched(*flags, "--engine.tensor_parallel_size", "2") as (url, process), RolloutClient(url) as client:
        client.push_weights("policy", policy_tensors(), 5)
        victim = process_of_an_engine(process, "Worker_TP")
        threading.Timer(1.0, victim.send_signal, [signal.SIGSTOP]).start()
        groups = list(client.rollouts(requests(8, 4, max_tokens=400, ignore_eos=True)))
        assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
        assert sorted(group.id for group in groups) == [f"g{i}" for i in range(8)]
        assert {span.version for g in groups for c in g.completions for span in c.weight_versions} == {5}
        assert client.engines().engines[0].restarts == 1
