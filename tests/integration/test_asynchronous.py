"""Leased batches and asynchronous training with real engines, and running completions at a weight update."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from engines import ROOT, launched, wait_until
from marks import again
from over_http import PROMPT, policy_tensors

from drafters.files.text_lines import json_lines
from rollout_service.client import RolloutClient
from rollout_service.protocol import GroupRequest, LeaseRequest, PromptsRequest, Sampling


def prompts(run, count=4, n=4, max_staleness=None, **sampling):
    groups = [GroupRequest(id=f"{i}", prompt=PROMPT, n=n, sampling=Sampling(**sampling)) for i in range(count)]
    return PromptsRequest(groups=groups, run=run, max_staleness=max_staleness)


PAUSES = 'rollout_weight_pause_seconds_count{of="policy"}'


def versions(groups):
    return [[span.version for span in c.weight_versions] for g in groups for c in g.completions]


def metric(client, name):
    """The sum over all series of the metric."""
    lines = [line for line in client.http.get("/metrics").text.split("\n") if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def begun(client):
    """Tokens that vLLM has generated."""
    return metric(client, "vllm:generation_tokens_total")


def push_in_the_middle(client, run, **fields):
    """Long groups from the queue, with a push while they are generated; the push's status and the groups."""
    before, version = begun(client), client.weights().policy.version + 1
    client.send_prompts(prompts(run, max_tokens=300, ignore_eos=True, **fields))
    wait_until(lambda: begun(client) > before + 200, 30, "generation is under way")
    status = client.push_weights("policy", policy_tensors(), version)
    batch = client.lease(LeaseRequest(groups=4, run=run, wait=120.0))
    assert len(batch.groups) == 4
    client.acknowledge(batch.lease)
    return status, batch.groups


def test_queued_groups_cross_a_push_and_a_tight_bound_has_them_generated_again(service):
    with RolloutClient(service) as client:
        pauses = metric(client, PAUSES)
        status, groups = push_in_the_middle(client, "loose")
        assert [status.version - 1, status.version] in versions(groups)
        assert 0.0 < status.pause <= status.seconds
        before = client.batches()
        status, groups = push_in_the_middle(client, "tight", max_staleness=0)
        assert versions(groups) == [[status.version]] * 16
        after = client.batches()
        assert after.dropped > before.dropped
        assert after.tokens_wasted > before.tokens_wasted
        assert metric(client, PAUSES) == pauses + 2


def test_an_engine_counts_its_idle_seconds_after_it_has_worked_and_not_while_it_works(service):
    with RolloutClient(service) as client:
        list(client.rollouts([GroupRequest(prompt=PROMPT, sampling=Sampling(max_tokens=2))]))
        (idle,) = client.batches().engines_idle
        time.sleep(0.5)
        assert idle + 0.4 < client.batches().engines_idle[0] < idle + 2.0
        before = begun(client)
        client.send_prompts(prompts("work", max_tokens=300, ignore_eos=True))
        wait_until(lambda: begun(client) > before, 30, "generation is under way")
        (working,) = client.batches().engines_idle
        wait_until(lambda: begun(client) > before + 500, 30, "it goes on")
        assert client.batches().engines_idle == [working]
        client.cancel_prompts("work")


def test_asynchronous_training_over_http(service, tmp_path):
    done = subprocess.run(
        [str(Path(sys.executable).parent / "rl-loop"), "train", "--config", "deploy/demo/train.toml", "--mode", "async",
         "--endpoint", service, "--steps", "4", "--prompts_per_step", "6", "--evaluate_every", "4",
         "--evaluation_prompts", "8", "--output", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = list(json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    for step in steps:
        assert len(step["staleness"]) <= 2
        assert step["importance_ratio"] == pytest.approx(1.0, abs=0.3)
        assert abs(step["z"]) < 4
    names = [n for line in json_lines(tmp_path / "run" / "groups.jsonl") for n in line["groups"]]
    assert sorted(names) == [f"train-{i:09d}" for i in range(24)]
    evaluations = list(json_lines(tmp_path / "run" / "evaluations.jsonl"))
    assert [e["step"] for e in evaluations] == [0, 4]
    with RolloutClient(service) as client:
        assert client.batches().leases == []


@pytest.mark.parametrize("running", [again("drain"), "restart", "keep"])
def test_what_running_completions_do_at_an_update_is_configured(running):
    flags = ["--weights.kv_cache", "keep"] if running == "keep" else []
    with (
        launched(
            "--config", "deploy/demo/service.toml", "--drafter.kind", "none", "--weights.running", running, *flags
        ) as (url, _),
        RolloutClient(url) as client,
    ):
        status, groups = push_in_the_middle(client, "r")
        wasted, found = client.batches().tokens_wasted, versions(groups)
        if running == "drain":  # all of them were running at the update
            assert found == [[0]] * 16
            assert wasted == 0
        elif running == "restart":
            assert found == [[1]] * 16
            assert wasted > 100
        else:
            assert [0, 1] in found
            assert wasted == 0
        assert status.pause > 0.0
