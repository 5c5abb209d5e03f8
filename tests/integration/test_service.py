"""One launched service with its MTP head on: everything a user does over HTTP, in the order that harms nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from engines import MODELS, ROOT, launched, wait_until
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drafters.scoring import score_tokens
from rollout_service.client import AsyncRolloutClient, RolloutClient, RolloutError
from rollout_service.evaluation.audit import audit
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.compare import compare
from rollout_service.evaluation.config import CompareConfig
from rollout_service.protocol import GroupRequest, Sampling

PROMPT = "State the final answer to the following arithmetic problem: 12 + 34 - 56 =\n"
KEYS = {
    "drafter", "draft_tokens", "concurrency", "acceptance_length", "acceptance_length_ci", "acceptance_rate",
    "acceptance_by_position", "tokens_per_second", "speedup", "z", "tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(service):
    with RolloutClient(service) as client:
        yield client


def requests(count=4, n=2, **sampling):
    return [GroupRequest(id=f"g{i}", prompt=PROMPT, n=n, sampling=Sampling(**sampling)) for i in range(count)]


def policy_tensors():
    tensors = load_file(MODELS / "policy" / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items()}


def mtp_tensors():
    return {name: tensor.float() for name, tensor in load_file(MODELS / "policy" / "mtp.safetensors").items()}


def worst_difference(groups, folder, change=None, **sampling):
    """Largest difference between returned and recomputed log-probabilities, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if change:
        change(model)
    worst = 0.0
    for group in groups:
        for completion in group.completions:
            tokens = torch.tensor(completion.token_ids)
            ids = torch.cat([torch.tensor(group.prompt_token_ids), tokens])[None]
            with torch.no_grad():
                logits = model(ids).logits[0, len(group.prompt_token_ids) - 1 : -1]
            expected = score_tokens(logits, tokens, **sampling).sampled_logprobs
            worst = max(worst, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return worst


def test_every_field_of_a_completion_means_what_the_design_says(client):
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    asked = [
        GroupRequest(id="text", prompt=PROMPT, n=3, sampling=Sampling(max_tokens=48, **sampling), metadata={"a": [1]}),
        GroupRequest(id="ids", prompt_token_ids=[10, 11], sampling=Sampling(max_tokens=8, ignore_eos=True, **sampling)),
        GroupRequest(id="chat", messages=[{"role": "user", "content": PROMPT.strip()}],
                     sampling=Sampling(max_tokens=48, **sampling)),
    ]  # fmt: skip
    groups = {group.id: group for group in client.rollouts(asked, model="demo-policy")}
    assert groups.keys() == {"text", "ids", "chat"}
    assert groups["text"].metadata == {"a": [1]}
    assert groups["text"].prompt_token_ids == groups["chat"].prompt_token_ids  # the template adds the newline
    assert [c.index for c in groups["text"].completions] == [0, 1, 2]
    for group in groups.values():
        for c in group.completions:
            assert len(c.token_ids) == len(c.logprobs)
            assert c.finish_reason == ("length" if len(c.token_ids) in (8, 48) else "stop")
            assert [(s.start, s.end) for s in c.weight_versions] == [(0, len(c.token_ids))]
            s = c.speculation
            assert s.drafter == "mtp"
            assert s.draft_steps == sum(s.accepted_histogram)
            assert s.accepted == sum(j * steps for j, steps in enumerate(s.accepted_histogram))
            assert s.accepted <= s.drafted
    assert worst_difference(groups.values(), MODELS / "policy", **sampling) < 1e-4


def test_groups_are_streamed_as_each_finishes(client):
    slow = GroupRequest(id="slow", prompt=PROMPT, n=8, sampling=Sampling(max_tokens=400, ignore_eos=True))
    fast = GroupRequest(id="fast", prompt=PROMPT, sampling=Sampling(max_tokens=4, ignore_eos=True))
    assert [group.id for group in client.rollouts([slow, fast])] == ["fast", "slow"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"groups": []}, 400, "groups"),
        ({"groups": [{"prompt": "a", "n": 0}]}, 400, "groups.0.n"),
        ({"groups": [{"prompt": "a", "sampling": {"top_p": 2}}]}, 400, "groups.0.sampling.top_p"),
        ({"groups": [{"prompt": "a", "sampling": {"max_tokens": 100000}}]}, 400, "groups.0.sampling.max_tokens"),
        ({"groups": [{"prompt": "7" * 600}]}, 400, "groups.0.prompt"),
        ({"groups": [{"prompt_token_ids": [4000]}]}, 400, "groups.0.prompt_token_ids"),
        ({"groups": [{"prompt": "a"}], "model": "other"}, 404, "model"),
        ({"grups": []}, 400, "grups"),
    ],
)
def test_bad_rollout_requests_are_4xx_and_name_the_field(client, body, status, field):
    response = client.http.post("/v1/rollouts", json=body)
    assert response.status_code == status
    assert field in [problem["field"] for problem in response.json()["problems"]]


def test_a_body_over_the_limit_is_refused(client):
    response = client.http.post("/v1/rollouts", content=b" " * (65 << 20), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_openai_routes_are_vllms_own(client):
    assert client.model()["id"] == "demo-policy"
    body = {"model": "demo-policy", "prompt": [10, 11], "max_tokens": 5, "return_token_ids": True, "logprobs": 1}
    choice = client.http.post("/v1/completions", json=body).json()["choices"][0]
    assert len(choice["token_ids"]) <= 5
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
    chat = {"model": "demo-policy", "messages": [{"role": "user", "content": "1 + 1 ="}], "max_tokens": 5}
    with client.http.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk"
    assert client.http.post("/v1/completions", json=body | {"model": "other"}).status_code == 404
    assert client.http.post("/v1/completions", json=body | {"temperature": -1}).status_code == 400
    assert client.http.post("/v1/completions", json=body | {"max_tokens": 10**6}).status_code == 400
    refused = client.http.post("/v1/completions", json=body | {"min_p": 0.1})
    assert (refused.status_code, refused.json()["problems"][0]["field"]) == (400, "min_p")


def test_sampling_defaults_are_the_services_own_and_are_echoed(client):
    (group,) = client.rollouts([GroupRequest(prompt=PROMPT, n=16, sampling=Sampling(max_tokens=48))])
    assert (group.sampling.temperature, group.sampling.top_p, group.sampling.top_k) == (1.0, 1.0, 0)
    assert len({tuple(c.token_ids) for c in group.completions}) > 1  # the checkpoint says: always the best token
    body = {"model": "demo-policy", "prompt": PROMPT, "max_tokens": 48, "n": 16, "return_token_ids": True, "top_k": 50}
    response = client.http.post("/v1/completions", json=body)
    assert json.loads(response.headers["x-sampling"]) == {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    assert len({tuple(choice["token_ids"]) for choice in response.json()["choices"]}) > 1


def test_every_path_keeps_the_positions_free_that_a_drafter_looks_ahead(client):
    limit = 512 - (3 + 1)
    assert client.model()["max_model_len"] == limit
    ids = [10] * (limit - 20)
    (group,) = client.rollouts(
        [GroupRequest(prompt_token_ids=ids, sampling=Sampling(max_tokens=20, ignore_eos=True))]
    )  # fmt: skip
    assert len(group.completions[0].token_ids) == 20
    with pytest.raises(RolloutError, match="1 to 20"):
        list(client.rollouts([GroupRequest(prompt_token_ids=ids, sampling=Sampling(max_tokens=21))]))
    body = {"model": "demo-policy", "prompt": ids, "return_token_ids": True, "ignore_eos": True}
    (choice,) = client.http.post("/v1/completions", json=body | {"max_tokens": 20}).json()["choices"]
    assert len(choice["token_ids"]) == 20
    for more in ({"max_tokens": 21}, {"max_tokens": 400}):  # vLLM's own route cuts them to what is left
        (choice,) = client.http.post("/v1/completions", json=body | more).json()["choices"]
        assert len(choice["token_ids"]) == 20
    assert client.http.post("/v1/completions", json=body | {"prompt": [10] * (limit + 1)}).status_code == 400


def test_the_audit_passes_a_running_endpoint(service, tmp_path):
    config = AuditConfig(
        model=str(MODELS / "policy"), endpoint=service, temperature=[1.0, 0.0], top_p=[0.9], top_k=[0], tokens=3000,
        contexts=8, output=tmp_path,
    )  # fmt: skip
    rows = audit(config)
    assert [row.failures for row in rows] == [[], []]
    assert rows[0].positions.keys() >= {"draft 1", "draft 2", "draft 3", "bonus", "undrafted", "context limit"}
    assert rows[1].greedy.identical + rows[1].greedy.explained == rows[1].greedy.compared
    assert [row["drafter"] for row in json.loads((tmp_path / "audit.json").read_text())] == ["mtp", "mtp"]


def running(client):
    """Requests in the engines' queues, by vLLM's own gauges."""
    lines = client.http.get("/metrics").text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


def test_a_client_that_disconnects_ends_its_generation(client):
    stream = client.rollouts(
        [
            GroupRequest(id="first", prompt=PROMPT, sampling=Sampling(max_tokens=2)),
            *requests(16, 8, max_tokens=450, ignore_eos=True),
        ]
    )
    assert next(stream).id == "first"
    wait_until(lambda: running(client) > 0, 10, "the others are running")
    stream.close()
    wait_until(lambda: running(client) == 0, 15, "their generation has ended")

    body = {"model": "demo-policy", "prompt": PROMPT, "n": 32, "max_tokens": 450, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{client.http.base_url}/v1/completions", json=body, timeout=1.0)
    wait_until(lambda: running(client) == 0, 15, "vLLM's own route has noticed too")


async def test_the_async_client_does_the_same(service):
    async with AsyncRolloutClient(service) as client:
        groups = [group async for group in client.rollouts(requests(2, 1, max_tokens=4))]
        assert {group.id for group in groups} == {"g0", "g1"}
        assert (await client.weights()).policy.tensors > 0
        assert (await client.speculation()).drafters[0].drafter == "mtp"


def test_speculation_and_metrics_count_the_same_drafts(client):
    before = client.speculation().drafters[0]
    groups = list(client.rollouts(requests(8, 4, max_tokens=48)))
    after = client.speculation().drafters[0]
    records = [c.speculation for g in groups for c in g.completions]
    assert after.accepted - before.accepted == sum(r.accepted for r in records)
    assert after.draft_steps - before.draft_steps == sum(r.draft_steps for r in records)
    assert 1 + (after.accepted - before.accepted) / (after.draft_steps - before.draft_steps) > 2.0
    text = client.http.get("/metrics").text
    counted = next(line for line in text.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total"))
    assert float(counted.rsplit(" ", 1)[1]) == after.accepted


def test_pushed_weights_serve_under_their_version_through_memory_and_http(client):
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

    client._shared_memory = lambda: None  # as from another machine
    try:
        client.push_weights("policy", policy_tensors(), version + 1)
    finally:
        del client._shared_memory
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


def test_a_drafters_push_changes_acceptance_and_never_the_policy(client):
    trained = acceptance(client)
    torch.manual_seed(0)
    noise = {name: torch.randn_like(tensor) * 0.02 for name, tensor in mtp_tensors().items()}
    version = client.weights().drafter.version
    client.push_weights("drafter", noise, version + 1)
    assert acceptance(client) < trained - 0.5
    fell = client.speculation().alarms[-1]
    assert (fell.kind, fell.of, fell.drafter_version) == ("acceptance_fell", "drafter", version + 1)
    assert 'rollout_speculation_alarms_total{kind="acceptance_fell"} 1.0' in client.http.get("/metrics").text
    assert worst_difference(client.rollouts(requests(2, 2, max_tokens=32)), MODELS / "policy") < 1e-4
    client.push_weights("drafter", mtp_tensors(), version + 2)
    assert abs(acceptance(client) - trained) < 0.3
    (mtp,) = client.speculation().drafters
    assert {version + 1, version + 2} <= {v.drafter_version for v in mtp.by_version}
    assert sum(a.draft_steps for a in mtp.by_age) == sum(v.draft_steps for v in mtp.by_version) == mtp.draft_steps
    classes = [c.from_tokens for c in mtp.by_context_length]
    assert classes == sorted({1 << (c.bit_length() - 1) for c in classes})
    assert {16, 32, 64} <= set(classes)  # prompts of some 30 tokens, and responses to them
    client.push_weights("drafter", mtp_tensors(), version + 3)
    again = client.speculation().alarms[-1]
    assert (again.kind, again.drafter_version) == ("not_changed", version + 3)
    with pytest.raises(RolloutError, match=r"lm_head\.weight"):
        client.push_weights("drafter", mtp_tensors() | {"lm_head.weight": torch.zeros(1)}, version + 4)
    reply = client.http.post(
        "/v1/weights/drafter", params={"version": version + 4, "checksum": "0" * 64}, content=b"\0" * 64,
        headers={"Content-Type": "application/octet-stream"},
    )  # fmt: skip
    assert (reply.status_code, reply.json()["problems"][0]["field"]) == (400, "checksum")


def test_compare_measures_a_running_endpoint(service, tmp_path):
    config = CompareConfig(
        model=str(MODELS / "policy"), prompts=ROOT / "deploy/demo/prompts.jsonl", endpoint=service, tokens=2000,
        response_tokens=40, concurrency=[8], rounds=1, output=tmp_path,
    )  # fmt: skip
    (row,) = compare(config)
    assert row.drafter == "mtp"
    assert row.tokens >= 2000
    assert abs(row.z) < 4
    (written,) = json.loads((tmp_path / "compare.json").read_text())
    assert written.keys() >= KEYS
    assert {f.name for f in tmp_path.iterdir()} == {"compare.json", "compare.md", "acceptance.png", "speedup.png"}


def test_training_over_http_publishes_its_policy_and_agrees_on_log_probabilities(client, service, tmp_path):
    version = client.weights().policy.version
    done = subprocess.run(
        [str(Path(sys.executable).parent / "rl-loop"), "train", "--config", "deploy/demo/train.toml",
         "--endpoint", service, "--steps", "2", "--prompts_per_step", "8", "--evaluate_every", "0",
         "--output", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2]
    assert client.weights().policy.version > version
    for step in steps:
        assert set(step["stages"]) == {"data", "prepare", "generation", "logprob", "train"}
        assert step["logprob_difference_max"] < 1e-4
        assert abs(step["z"]) < 4
        assert step["acceptance_length"] > 1.5


def engine_process(service_process):
    children = psutil.Process(service_process.pid).children(recursive=True)
    return next(p for p in children if "EngineCore" in " ".join(p.cmdline()))


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
            victim = engine_process(process)
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
        children += psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        wait_until(lambda: not any(p.is_running() for p in children), 15, "every process has ended")
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("rollout-service")}
    assert left == set()
