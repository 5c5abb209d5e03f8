"""An engine that dies, and a service that is told to stop."""

import os
import signal
import threading

import httpx
import psutil
import pytest
from engines import MODELS, launched, launching, stopped, wait_until
from over_http import policy_tensors, requests, worst_difference

from rollout_service.client import RolloutClient


def find_child(process, name):
    children = psutil.Process(process.pid).children(recursive=True)
    return next((child for child in children if name in " ".join(child.cmdline())), None)


def test_an_engines_death_costs_time_only_and_ctrl_c_leaves_nothing():
    """Two engines of their own: one is killed with pushed weights in service and groups under way; then Ctrl-C."""
    before = set(os.listdir("/dev/shm"))
    with launched("--config", "deploy/demo/service.toml", "--drafter.kind", "ngram", "--engines", "2") as (
        url,
        process,
    ):
        children = psutil.Process(process.pid).children(recursive=True)
        with RolloutClient(url) as client:
            changed = policy_tensors()
            changed["lm_head.weight"] *= 0.5
            client.push_weights("policy", changed, 5)
            victim = find_child(process, "EngineCore")
            threading.Timer(1.0, victim.kill).start()
            groups = list(client.rollouts(requests(24, 8, max_tokens=400, ignore_eos=True)))
            assert not victim.is_running()
            assert len({g.id for g in groups}) == 24
            assert {s.version for g in groups for c in g.completions for s in c.weight_versions} == {5}
            wait_until(client.ready, 60, "the new engine is in service")
            groups = list(client.rollouts(requests(8, 2, max_tokens=16)))
            assert {g.engine for g in groups} == {0, 1}
            difference = worst_difference(
                groups, MODELS / "policy",
                lambda model: model.lm_head.weight.data.mul_(0.5),
            )  # fmt: skip
            assert difference < 1e-4
        assert stopped(process, signal.SIGINT) == (0, [])
        assert not any(child.is_running() for child in children)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health", trust_env=False)
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("rollout-service")}
    assert left == set()


@pytest.mark.parametrize("starting", ["RuntimeEnvAgent", "ray::Engine", "vllm_plugin.preloaded"])
def test_a_service_that_is_told_to_stop_while_it_starts_leaves_nothing(starting):
    with launching("--config", "deploy/demo/service.toml", "--drafter.kind", "none") as process:
        wait_until(lambda: find_child(process, starting), 60, f"{starting} is there")
        assert stopped(process, signal.SIGTERM) == (0, [])
