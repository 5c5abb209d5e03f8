"""Control routes on two real engines: pauses, weight updates of several calls, relabelling, and deaths in between."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from engines import MODELS, launched, stopped, wait_until
from over_http import PROMPT, mtp_tensors, policy_tensors, requests, worst_difference
from safetensors.torch import save_file

from rollout_service.client import RolloutClient, RolloutError

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def running():
    """The service's client and process."""
    flags = ("--drafter.kind", "mtp", "--drafter.schedule", "fixed", "--engines", "2")
    with launched("--config", "deploy/demo/service.toml", *flags) as (url, process), RolloutClient(url) as client:
        yield client, process


@pytest.fixture
def client(running):
    yield running[0]
    running[0].http.post("/resume").raise_for_status()


def post(client, path, **more):
    return client.http.post(path, **more)


def ok(client, path, **more):
    answer = post(client, path, timeout=120, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def version(client):
    return client.weights().policy.version


def scaled(factor):
    tensors = policy_tensors()
    tensors[HEAD] *= factor
    return tensors


def folder_of(tensors, folder, dtype=torch.float32):
    """A checkpoint folder of two files."""
    folder.mkdir()
    parts = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    index = {}
    for number, part in enumerate(parts):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in part.items()}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return str(folder)


def assert_serves(client, expected_version, factor, **how):
    """Both engines sample from the checkpoint with its head scaled, and say this version."""
    groups = list(client.rollouts(requests(8, 2, max_tokens=24)))
    assert {group.engine for group in groups} == {0, 1}
    assert {s.version for g in groups for c in g.completions for s in c.weight_versions} == {expected_version}
    assert (
        worst_difference(groups, MODELS / "policy", lambda model: model.lm_head.weight.data.mul_(factor), **how) < 1e-4
    )


def test_a_folder_is_published_whole_on_every_engine_and_tensors_of_the_drafter_are_left_out(client, tmp_path):
    was = version(client)
    folder = folder_of(scaled(0.5) | mtp_tensors(), tmp_path / "weights")
    answer = ok(client, "/update_weights", content=json.dumps({"weight_dir": folder}))  # no content type
    assert answer["weight_version"] == str(was + 1) == ok_get(client, "/weight_info")["weight_version"]
    assert set(answer["ignored"]) == set(mtp_tensors())
    assert_serves(client, was + 1, 0.5)


def ok_get(client, path, **more):
    answer = client.http.get(path, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_update_of_several_calls_changes_nothing_before_it_is_finished(client, tmp_path):
    ok(client, "/update_weights", json={"weight_dir": str(MODELS / "policy")})
    was, tensors = version(client), scaled(0.25)
    shared = Path(client.weights().shared_memory) / "push-part.safetensors"
    names = list(tensors)
    ok(client, "/start_weight_update", json={"is_checkpoint_format": True})
    second = post(client, "/start_weight_update")
    assert (second.status_code, "is open since" in second.text) == (409, True)
    folder = folder_of({name: tensors[name] for name in names[:9]}, tmp_path / "part")
    ok(client, "/update_weights", json={"update_info": {"weight_dir": folder}})
    save_file({name: tensors[name] for name in names[9:]}, shared)
    ok(client, "/update_weights", json={"update_info": [{"file": shared.name}]})
    shared.unlink()
    assert_serves(client, was, 1.0)
    wrong = post(client, "/finish_weight_update", json={"weight_version": str(was)})
    assert wrong.status_code == 409
    assert ok(client, "/finish_weight_update", json={"weight_version": str(was + 7)})["weight_version"] == str(was + 7)
    assert_serves(client, was + 7, 0.25)


@pytest.mark.parametrize("cut", ["a tensor is missing", "a file is cut", "a tensor is unknown", "the client leaves"])
def test_an_update_that_is_cut_leaves_the_old_weights_and_a_new_one_may_start(client, tmp_path, cut):
    ok(client, "/update_weights", json={"weight_dir": folder_of(scaled(0.5), tmp_path / "whole")})
    was, tensors = version(client), scaled(0.125)
    if cut == "a tensor is missing":
        del tensors["model.norm.weight"]
    if cut == "a tensor is unknown":
        tensors["model.layers.99.weight"] = torch.zeros(2)
    folder = folder_of(tensors, tmp_path / "weights")
    if cut == "a file is cut":
        file = next(Path(folder).glob("*2-of-*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])
    if cut == "the client leaves":
        ok(client, "/start_weight_update", json={})
        refusal = post(client, "/finish_weight_update")
    else:
        refusal = post(client, "/update_weights", json={"weight_dir": folder})
    assert refusal.status_code == 400
    named = {"a tensor is missing": "model.norm.weight", "a file is cut": "2-of-00002.safetensors",
             "a tensor is unknown": "model.layers.99.weight", "the client leaves": HEAD}  # fmt: skip
    assert named[cut] in refusal.text
    assert version(client) == was
    assert_serves(client, was, 0.5)
    ok(client, "/start_weight_update")
    ok(client, "/update_weights", json={"update_info": {"weight_dir": str(MODELS / "policy")}})
    assert ok(client, "/finish_weight_update")["weight_version"] == str(was + 1)
    assert_serves(client, was + 1, 1.0)


def test_vllms_own_client_updates_the_weights(client):
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    was, theirs = version(client), HTTPVLLMWeightSyncClient(str(client.http.base_url))
    for weight_version, expected in ((None, was + 1), (str(was + 5), was + 5)):
        theirs.start_weight_update()
        theirs.update_weights({"weight_dir": str(MODELS / "policy")})
        theirs.finish_weight_update(weight_version)
        assert version(client) == expected
    assert_serves(client, was + 5, 1.0)


def test_a_client_that_leaves_within_its_request_changes_nothing(client):
    was, url = version(client), client.http.base_url
    head = "POST /update_weights HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(f'{head}{{"weight_dir": "{MODELS / "policy"}"'.encode())
    time.sleep(1.0)
    assert version(client) == was
    assert ok(client, "/update_weights", json={"weight_dir": str(MODELS / "policy")})["weight_version"] == str(was + 1)


def test_an_update_of_the_drafter_leaves_the_policy_out_and_never_changes_it(client, tmp_path):
    was = client.weights()
    noise = {name: torch.randn_like(tensor) * 0.02 for name, tensor in mtp_tensors().items()}
    ok(client, "/update_weights", json={"weight_dir": str(MODELS / "policy")})
    folder = folder_of(scaled(0.5) | noise, tmp_path / "weights")
    for source in (folder, str(MODELS / "policy")):
        ok(client, "/start_draft_weight_update", json={})
        left_out = ok(client, "/update_weights", json={"update_info": {"weight_dir": source}})["ignored"]
        assert set(left_out) == set(policy_tensors())
        ok(client, "/finish_weight_update", json={})
        assert_serves(client, was.policy.version + 1, 1.0)
    assert client.weights().drafter.version == was.drafter.version + 2


def tokens(client):
    lines = client.http.get("/metrics").text.splitlines()
    return sum(float(s.rsplit(" ", 1)[1]) for s in lines if s.startswith("vllm:generation_tokens_total{"))


def long_groups(count=6):
    return requests(count, 4, max_tokens=400, ignore_eos=True)


def begun(client, pool, groups):
    """The groups, under way."""
    before = tokens(client)
    future = pool.submit(lambda: list(client.rollouts(groups)))
    wait_until(lambda: tokens(client) > before, 30, "the engines generate")
    return future


def whole(groups, count=6):
    assert len({group.id for group in groups}) == count
    return all(len(c.token_ids) == 400 for group in groups for c in group.completions)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_no_group_is_lost_to_a_pause_and_nothing_is_generated_in_it(client, pool, mode):
    was = version(client)
    groups = begun(client, pool, long_groups())
    assert ok(client, f"/pause?mode={mode}&clear_cache=false") == {"status": "paused"}
    assert ok_get(client, "/is_paused") == {"is_paused": True}
    assert ok_get(client, "/ready") == {"ready": True, "paused": True}
    assert "\nrollout_paused 1.0" in client.http.get("/metrics").text
    still = tokens(client)
    late = pool.submit(lambda: list(client.rollouts(requests(2, 1, max_tokens=4))))
    client.push_weights("policy", policy_tensors(), was + 1)  # inside the pause
    time.sleep(2.0)
    assert tokens(client) == still
    assert not late.done()
    assert groups.done() == (mode == "wait")
    assert ok(client, "/resume") == {"status": "resumed"}
    finished = groups.result(120)
    assert whole(finished)
    versions = {s.version for g in finished for c in g.completions for s in c.weight_versions}
    assert versions == {"keep": {was, was + 1}, "wait": {was}, "abort": {was + 1}}[mode]
    assert {s.version for g in late.result(60) for c in g.completions for s in c.weight_versions} == {was + 1}
    assert ok_get(client, "/is_paused") == {"is_paused": False}


def test_a_queued_group_waits_out_a_pause_that_ends_it(client):
    from rollout_service.protocol import LeaseRequest, PromptsRequest

    before = tokens(client)
    client.send_prompts(PromptsRequest(run="paused", groups=long_groups(3)))
    wait_until(lambda: tokens(client) > before, 30, "the engines generate")
    ok(client, "/pause")
    time.sleep(1.0)
    assert client.lease(LeaseRequest(run="paused", groups=1, wait=0.0)).groups == []
    ok(client, "/resume")
    batch = client.lease(LeaseRequest(run="paused", groups=3, wait=120.0))
    assert whole(batch.groups, 3)
    assert batch.failed == []
    client.acknowledge(batch.lease)


def completion(client):
    body = {"model": "demo-policy", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
    return client.http.post("/v1/completions", json=body, timeout=120).json()["choices"][0]


def test_a_completion_is_frozen_by_keep_and_ends_at_an_abort(client, pool):
    before = tokens(client)
    asked = pool.submit(completion, client)
    wait_until(lambda: tokens(client) > before, 30, "the engine generates")
    ok(client, "/pause?mode=keep")
    time.sleep(1.0)
    assert not asked.done()
    ok(client, "/resume")
    assert asked.result(60)["finish_reason"] == "length"
    before = tokens(client)
    asked = pool.submit(completion, client)
    wait_until(lambda: tokens(client) > before, 30, "the engine generates")
    assert ok(client, "/abort_requests", json={})["aborted"] >= 1
    assert asked.result(60)["finish_reason"] == "abort"


def test_aborted_groups_are_generated_again_without_a_pause(client, pool):
    groups = begun(client, pool, long_groups())
    assert ok(client, "/abort_requests")["aborted"] > 0
    assert whole(groups.result(120))
    assert post(client, "/inference/v1/abort_requests", json={"request_ids": ["unknown"]}).status_code == 200
    assert post(client, "/inference/v1/abort_requests").status_code == 400


def test_an_engine_that_restarts_in_a_pause_takes_the_weights_and_the_pause(running, client, pool):
    _, process = running
    ok(client, "/update_weights", json={"weight_dir": str(MODELS / "policy")})
    was = version(client)
    relabelled = ok(client, "/update_weight_version", json={"new_version": str(was + 3)})
    assert relabelled == {"success": True, "new_version": str(was + 3)}
    assert_serves(client, was + 3, 1.0)
    groups = begun(client, pool, long_groups())
    ok(client, "/pause?mode=keep&clear_cache=false")
    children = psutil.Process(process.pid).children(recursive=True)
    victim = next(child for child in children if "EngineCore" in " ".join(child.cmdline()))
    victim.kill()
    wait_until(lambda: not client.ready(), 60, "the death is noticed")
    wait_until(client.ready, 120, "the engine is in service again")
    still = tokens(client)
    time.sleep(2.0)
    assert (tokens(client), groups.done()) == (still, False)
    ok(client, "/resume")
    finished = groups.result(180)
    assert whole(finished)
    assert {s.version for g in finished for c in g.completions for s in c.weight_versions} == {was + 3}
    assert_serves(client, was + 3, 1.0)


def test_checksums_are_the_same_on_every_engine_and_change_with_every_layer(client, tmp_path):
    ok(client, "/update_weights", json={"weight_dir": str(MODELS / "policy")})
    baseline = ok(client, "/weight_checker", json={"action": "checksum"})["checksums"]
    ok(client, "/update_weights", json={"weight_dir": str(MODELS / "policy")})
    again = ok(client, "/weight_checker", json={"action": "compare", "baseline": baseline})
    assert again == {"match": True, "mismatches": []}
    ok(client, "/update_weights", json={"weight_dir": folder_of(scaled(0.5), tmp_path / "weights")})
    changed = ok(client, "/weight_checker", json={"action": "compare", "baseline": baseline})
    assert changed["match"] is False
    assert all("lm_head" in name for name in changed["mismatches"])
    assert post(client, "/weight_checker", json={"action": "reset"}).status_code == 400


def test_trainers_read_what_they_need_of_the_server(client):
    info = ok_get(client, "/server_info", params={"config_format": "json"})["vllm_config"]
    assert info["weight_transfer_config"] == {"backend": "weight_dir", "offered": ["weight_dir", "file"]}
    assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert "float32" in info["model_config"]["dtype"]
    assert isinstance(ok_get(client, "/server_info")["vllm_config"], str)
    assert ok_get(client, "/get_world_size", params={"include_dp": "false"}) == {"world_size": 1}
    refusal = post(client, "/init_weight_transfer_engine", json={"init_info": {"master_address": "::1"}})
    assert (refusal.status_code, "need a GPU" in refusal.text) == (400, True)
    refusal = post(client, "/collective_rpc", json={"method": "reset_weights"})
    assert (refusal.status_code, "/update_weights" in refusal.text) == (403, True)


def test_a_cpu_sleeps_by_pausing_and_says_so(client, pool):
    assert ok(client, "/sleep?level=2&mode=keep&tags=weights") == {"status": "sleeping", "level": 2, "memory": "kept"}
    assert ok_get(client, "/is_sleeping") == {"is_sleeping": True}
    assert post(client, "/resume").status_code == 409
    asked = pool.submit(lambda: list(client.rollouts(requests(1, 1, max_tokens=4))))
    assert ok(client, "/wake_up?tags=weights") == {"status": "sleeping", "tags": ["weights"]}
    ok(client, "/update_weights", json={"weight_dir": str(MODELS / "policy")})
    assert not asked.done()
    assert ok(client, "/wake_up?tags=kv_cache") == {"status": "awake", "tags": ["kv_cache"]}
    assert len(asked.result(60)) == 1
    assert ok(client, "/reset_prefix_cache", json={"reset_running_requests": False}) == {"success": True}


def test_a_paused_service_with_frozen_groups_stops_in_order(running):
    """The last test of the shared service."""
    client, process = running
    with ThreadPoolExecutor(1) as pool:
        groups = begun(client, pool, long_groups())
        ok(client, "/pause?mode=keep")
        assert stopped(process, signal.SIGTERM) == (0, [])
        with pytest.raises(RolloutError, match="stopping"):
            groups.result(10)
