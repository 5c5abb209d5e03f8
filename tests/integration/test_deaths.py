"""Deaths: an engine that dies, and a service that is told to stop."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from engines import MODELS, START_WITHIN, launched, launching, stopped, wait_until
from marks import again
from over_http import PROMPT, policy_tensors, requests, worst_difference

from rollout_service.client import RolloutClient


def find_child(process, name):
    children = psutil.Process(process.pid).children(recursive=True)
    return next((child for child in children if name in " ".join(child.cmdline())), None)


def test_an_engines_death_costs_time_only_and_ctrl_c_leaves_nothing():
    """One of two engines is killed, with pushed weights in service and running groups. Then Ctrl-C ends the service."""
    with launched("--config", "deploy/demo/service.toml", "--drafter.kind", "ngram", "--engines", "2") as (
        url,
        process,
    ):
        children = psutil.Process(process.pid).children(recursive=True)
        with RolloutClient(url) as client:
            changed = policy_tensors()
            changed["lm_head.weight"] *= 0.5
            client.push_weights("policy", changed, 5)
            shared_memory = Path(client.weights().shared_memory)
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
            with ThreadPoolExecutor(3) as pool:
                running = all_kinds_of_work(client.http, pool)
                assert stopped(process, signal.SIGINT) == (0, [])
        assert_told_that_it_stops(*(request.result() for request in running))
        assert not any(child.is_running() for child in children)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health", trust_env=False)
    assert not shared_memory.exists()


def all_kinds_of_work(http, pool):
    """A rollout stream, a completion, and a streamed completion. All take much longer than this test lets them."""
    groups = [{"id": str(i), "prompt": PROMPT, "n": 16, "sampling": {"max_tokens": 400, "ignore_eos": True}}
              for i in range(64)]  # fmt: skip
    body = {"model": "demo-policy", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "n": 128}
    requests = ("rollouts", {"groups": groups}), ("completions", body), ("completions", body | {"stream": True})
    running = [pool.submit(http.post, f"/v1/{path}", json=json) for path, json in requests]
    time.sleep(2.0)
    assert not any(request.done() for request in running)
    return running


def assert_told_that_it_stops(rollout, completion, stream):
    last = json.loads(rollout.text.rstrip("\n").split("\n")[-1])
    assert "the service is stopping" in last["error"]
    assert completion.status_code == 503
    assert int(completion.headers["retry-after"]) > 0
    event = stream.text.rstrip("\n").split("\n\n")[-1]
    for error in (completion.json()["error"], json.loads(event.removeprefix("data: "))["error"]):
        assert error["code"] == 503
        assert "stopping" in error["message"]


def streamed(http, body, all_begun):
    """The events of a streamed completion. It waits at the first one until all streams have begun."""
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        first = next(lines)
        all_begun.wait()
        return [first, *lines]


def test_openai_requests_outlive_an_engine_or_say_that_it_died():
    """One of two engines is killed while it answers both kinds of requests."""
    flags = ("--config", "deploy/demo/service.toml", "--drafter.kind", "none", "--engines", "2")
    body = {"model": "demo-policy", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
    with launched(*flags) as (url, process), httpx.Client(base_url=url, timeout=120) as http:
        http.post("/v1/completions", json=body).raise_for_status()
        with ThreadPoolExecutor(12) as pool:
            whole = [pool.submit(http.post, "/v1/completions", json=body | {"n": 4}) for _ in range(6)]
            all_begun = threading.Barrier(7, timeout=60)
            streams = [pool.submit(streamed, http, body, all_begun) for _ in range(6)]
            all_begun.wait()
            find_child(process, "EngineCore").kill()
            time.sleep(0.5)
            assert http.get("/health").status_code == 200
            assert http.get("/v1/models").json()["data"][0]["id"] == "demo-policy"
            assert http.get("/metrics").status_code == http.get("/v1/speculation").status_code == 200
        assert [answer.result().status_code for answer in whole] == [200] * 6
        events = [stream.result() for stream in streams]
        broken = [lines for lines in events if lines[-1] != "data: [DONE]"]
        assert 0 < len(broken) < 6
        assert all(lines[-1].startswith('data: {"error": {"message": ') for lines in broken)


@pytest.mark.parametrize("starting", [again("RuntimeEnvAgent"), again("ray::Engine"), "vllm_plugin.preloaded"])
def test_a_service_that_is_told_to_stop_while_it_starts_leaves_nothing(starting):
    with launching("--config", "deploy/demo/service.toml", "--drafter.kind", "none") as process:
        wait_until(lambda: find_child(process, starting), 60, f"{starting} is there")
        assert stopped(process, signal.SIGTERM) == (0, [])


def test_an_engine_that_cannot_start_says_why_in_one_line():
    small = ("--drafter.kind", "none", "--engine.kv_cache_gib", "0.00001")
    with launching("--config", "deploy/demo/service.toml", *small) as process:
        said = process.communicate(timeout=START_WITHIN)[1].rstrip("\n").split("\n")
    assert process.returncode == 1
    assert said[-1].startswith("rollout-service launch: an engine could not start")
    assert "No available memory for the cache blocks" in said[-1]
