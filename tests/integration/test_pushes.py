"""Pushes of weights into a running service: versions, refusals, and what a drafter's push changes."""

from itertools import pairwise

import pytest
import torch
from engines import MODELS, launched
from over_http import PROMPT, mtp_tensors, policy_tensors, requests, worst_difference
from safetensors.torch import save

from rollout_service.client import RolloutClient, RolloutError
from rollout_service.protocol import GroupRequest, Sampling


def test_pushed_weights_serve_under_their_version_through_memory_and_http(client, monkeypatch):
    def halved(model):
        model.lm_head.weight.data.mul_(0.5)

    changed = policy_tensors()
    changed["lm_head.weight"] *= 0.5
    version = client.weights().policy.version + 1
    status = client.push_weights("policy", changed, version)
    assert status.version == version == client.weights().policy.version
    groups = list(client.rollouts(requests(4, 2, max_tokens=32)))
    assert {s.version for g in groups for c in g.completions for s in c.weight_versions} == {version}
    assert worst_difference(groups, MODELS / "policy", halved) < 1e-4

    with monkeypatch.context() as elsewhere:  # as from another machine
        elsewhere.setattr("rollout_service.transports.is_of_this_machine", lambda folder: False)
        client.push_weights("policy", policy_tensors(), version + 1)
    assert worst_difference(client.rollouts(requests(4, 2, max_tokens=32)), MODELS / "policy") < 1e-4


def test_running_completions_go_on_across_a_push_and_say_which_version_sampled_what(client):
    version = client.weights().policy.version + 1
    stream = client.rollouts([
        GroupRequest(id="first", prompt=PROMPT, sampling=Sampling(max_tokens=2)),
        *requests(4, 8, max_tokens=450, ignore_eos=True),
    ])  # fmt: skip
    next(stream)
    client.push_weights("policy", policy_tensors(), version)
    spans = [c.weight_versions for group in stream for c in group.completions]
    assert any([s.version for s in span] == [version - 1, version] for span in spans)
    for span in spans:
        assert (span[0].start, span[-1].end) == (0, 450)
        assert all(a.end == b.start for a, b in pairwise(span))


def test_a_refused_update_names_every_tensor_and_changes_nothing(client):
    before = client.weights()
    wrong = policy_tensors()
    del wrong["model.norm.weight"]
    wrong["lm_head.weight"] = wrong["lm_head.weight"][:, :-1]
    wrong["model.embed_tokens.weight"] = wrong["model.embed_tokens.weight"].bfloat16()
    with pytest.raises(RolloutError) as refusal:
        client.push_weights("policy", wrong, before.policy.version + 1)
    assert refusal.value.status == 400
    named = {problem.field for problem in refusal.value.body.problems}
    assert named == {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"}
    with pytest.raises(RolloutError) as stale:
        client.push_weights("policy", policy_tensors(), before.policy.version)
    assert stale.value.status == 409
    assert client.weights() == before
    assert worst_difference(client.rollouts(requests(2, 1, max_tokens=16)), MODELS / "policy") < 1e-4


def acceptance(client):
    records = [
        c.speculation for g in client.rollouts(requests(16, 4, max_tokens=48)) for c in g.completions if c.speculation
    ]
    return 1 + sum(r.accepted for r in records) / sum(r.draft_steps for r in records)


def falls(client):
    """The number of alarms for a fall of acceptance, from the metrics."""
    name = 'rollout_speculation_alarms_total{kind="acceptance_fell"} '
    found = [line for line in client.http.get("/metrics").text.split("\n") if line.startswith(name)]
    return float(found[0].removeprefix(name)) if found else 0.0


def test_a_drafters_push_changes_acceptance_and_never_the_policy(client):
    trained, fallen_before = acceptance(client), falls(client)
    torch.manual_seed(0)
    noise = {name: torch.randn_like(tensor) * 0.02 for name, tensor in mtp_tensors().items()}
    version = client.weights().drafter.version
    client.push_weights("drafter", noise, version + 1)
    assert acceptance(client) < trained - 0.5
    fell = client.speculation().alarms[-1]
    assert (fell.kind, fell.of, fell.drafter_version) == ("acceptance_fell", "drafter", version + 1)
    assert falls(client) == fallen_before + 1.0
    assert worst_difference(client.rollouts(requests(2, 2, max_tokens=32)), MODELS / "policy") < 1e-4
    client.push_weights("drafter", mtp_tensors(), version + 2)
    assert abs(acceptance(client) - trained) < 0.3
    (mtp,) = client.speculation().drafters
    assert {version + 1, version + 2} <= {v.drafter_version for v in mtp.by_version}
    assert sum(a.draft_steps for a in mtp.by_age) == sum(v.draft_steps for v in mtp.by_version) == mtp.draft_steps
    classes = [c.from_tokens for c in mtp.by_context_length]
    assert classes == sorted({1 << (c.bit_length() - 1) for c in classes})
    assert {16, 32, 64} <= set(classes)  # prompts of about 30 tokens, and their responses
    client.push_weights("drafter", mtp_tensors(), version + 3)
    again = client.speculation().alarms[-1]
    assert (again.kind, again.drafter_version) == ("not_changed", version + 3)
    with pytest.raises(RolloutError, match=r"lm_head\.weight"):
        client.push_weights("drafter", mtp_tensors() | {"lm_head.weight": torch.zeros(1)}, version + 4)
    reply = client.http.post(
        "/v1/weights/drafter", params={"version": version + 4, "checksum": "0" * 64}, content=save(mtp_tensors()),
        headers={"Content-Type": "application/octet-stream"},
    )  # fmt: skip
    assert (reply.status_code, reply.json()["problems"][0]["field"]) == (400, "checksum")


def test_what_begins_after_a_push_does_not_meet_a_kept_cache_on_any_route():
    """The cache is kept across pushes. vLLM's counter of prompt tokens found in the cache shows the hits."""

    def found(route, asked):
        def hits():
            lines = client.http.get("/metrics").text.splitlines()
            return sum(float(s.rsplit(" ", 1)[1]) for s in lines if s.startswith("vllm:prefix_cache_hits_total{"))

        before = hits()
        client.http.post(route, json={"model": "demo-policy"} | asked).raise_for_status()
        return hits() - before

    flags = ("--config", "deploy/demo/service.toml", "--drafter.kind", "none", "--weights.kv_cache", "keep")
    with launched(*flags, "--engines", "1") as (url, _), RolloutClient(url) as client:
        for route, asked in (
            ("/v1/completions", {"prompt": [10] * 300, "max_tokens": 2}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1" * 300}], "max_tokens": 2}),
            ("/inference/v1/generate", {"token_ids": [11] * 300, "sampling_params": {"max_tokens": 2}}),
        ):
            assert [found(route, asked), found(route, asked)] == [0, 256]
            assert found(route, asked | {"cache_salt": "mine"}) == 0
            client.push_weights("policy", policy_tensors(), client.weights().policy.version + 1)
            assert [found(route, asked), found(route, asked)] == [0, 256]
