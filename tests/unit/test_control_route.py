"""The control routes take the odd bodies of real trainers, answer as vLLM does, and refuse what breaks a promise."""

import pytest
from front import StubFleet, front
from pydantic import SecretStr

from rollout_service.engine.server_info import HIDDEN, without_secrets
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.updates import Pushed
from rollout_service.http.routes import fleet as fleet_routes
from rollout_service.http.routes import pausing, server, updates
from rollout_service.protocol import WeightStatus
from rollout_service.protocol.control import CONTROL_PATHS


class Recorder:
    """Answers every method with `answers[name]`, and notes the calls."""

    paused, frees_memory = False, False

    def __init__(self, **answers):
        self.answers, self.calls = answers, []

    def __getattr__(self, name):
        async def call(*arguments):
            self.calls.append((name, *arguments))
            answer = self.answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def check_awake(self):
        pass


PUSHED = Pushed("policy", WeightStatus(version=5, tensors=1, bytes=0, checksum=""), ["mtp.fc"])


def fleet(**answers):
    made = StubFleet()
    made.pausing = made.controls = made.updates = Recorder(
        update=["mtp.fc"], finish=PUSHED, push_folder=PUSHED, abort_requests=3, reset_prefix_cache=False, wake_up=True,
        weight_checksums={"a": "1", "b": "2"}, **answers,
    )  # fmt: skip
    return made


def test_the_list_of_control_paths_is_that_of_the_routes():
    modules = pausing, updates, server, fleet_routes
    paths = {route.path for module in modules for route in module.router.routes}
    assert sorted(paths) == sorted(CONTROL_PATHS)


UPDATED = {"message": "Weights updated", "weight_version": None, "ignored": ["mtp.fc"]}
FINISHED = {"message": "Weight update finished", "weight_version": "5", "ignored": ["mtp.fc"]}


@pytest.mark.parametrize(
    ("path", "more", "call", "answer"),
    [
        ("/pause", {}, ("pause", "abort", True), {"status": "paused"}),
        ("/pause?mode=keep&clear_cache=false", {"json": {}}, ("pause", "keep", False), {"status": "paused"}),
        ("/resume", {"content": b"anything"}, ("resume",), {"status": "resumed"}),
        ("/abort_requests", {}, ("abort_requests", None), {"status": "aborted", "aborted": 3}),
        ("/abort_requests", {"json": {"request_ids": []}}, ("abort_requests", None),
         {"status": "aborted", "aborted": 3}),
        ("/reset_prefix_cache", {"json": {"reset_running_requests": True}}, ("reset_prefix_cache", False, False),
         {"success": False}),
        ("/sleep?level=2&tags=weights", {}, ("sleep", "abort"), {"status": "sleeping", "level": 2, "memory": "kept"}),
        ("/sleep?level=0&mode=keep", {}, ("pause", "keep", False),
         {"status": "sleeping", "level": 0, "memory": "kept"}),
        ("/wake_up?tags=weights&tags=kv_cache", {}, ("wake_up", ["weights", "kv_cache"]),
         {"status": "awake", "tags": ["weights", "kv_cache"]}),
        ("/start_weight_update", {"json": {"is_checkpoint_format": True}}, ("start", "policy"), None),
        ("/start_draft_weight_update", {}, ("start", "drafter"), None),
        ("/update_weights", {"content": b'{"weight_dir": "/w"}', "headers": {"content-type": "text/plain"}},
         ("push_folder", "policy", "/w"), FINISHED | {"message": "Weights updated"}),
        ("/update_weights", {"json": {"update_info": [{"names": ["a"]}]}}, ("update", {"names": ["a"]}), UPDATED),
        ("/finish_weight_update", {}, ("finish", None), FINISHED),
        ("/finish_weight_update", {"json": {}}, ("finish", None), FINISHED),
        ("/finish_weight_update", {"json": {"weight_version": None}}, ("finish", None), FINISHED),
        ("/finish_weight_update", {"json": {"weight_version": "5"}}, ("finish", "5"), FINISHED),
        ("/update_weight_version", {"json": {"new_version": "9"}}, ("relabel", "9"),
         {"success": True, "new_version": "9"}),
        ("/weight_checker", {"json": {"action": "checksum"}}, ("weight_checksums",),
         {"checksums": {"a": "1", "b": "2"}}),
        ("/weight_checker", {"json": {"action": "compare", "baseline": {"a": "1", "c": "3"}}}, ("weight_checksums",),
         {"match": False, "mismatches": ["b", "c"]}),
        ("/init_weight_transfer_engine", {"json": {"init_info": {"packed": True}}}, ("open_transfer", {"packed": True}),
         None),
        ("/shutdown_weight_transfer_engine", {}, ("close_transfer",), None),
    ],
)  # fmt: skip
async def test_a_trainers_request_is_understood_whatever_its_body_looks_like(path, more, call, answer):
    recorded = fleet()
    async with front(recorded) as (client, _):
        given = await client.post(path, **more)
    assert given.status_code == 200, given.text
    assert recorded.updates.calls == [call]
    if answer is not None:
        assert given.json() == answer


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/update_weights", {"weigth_dir": "/w"}, "weigth_dir"),
        ("/update_weights", {"weight_dir": None}, "update_info"),
        ("/update_weights", {"weight_dir": "/w", "update_info": {}}, "update_info"),
        ("/update_weights", {"update_info": [{}, {}]}, "update_info"),
        ("/finish_weight_update", {"version": "3"}, "version"),
        ("/finish_weight_update", {"weight_version": 3}, "weight_version"),
        ("/update_weight_version", {}, "new_version"),
        ("/weight_checker", {"action": "reset"}, "action"),
        ("/weight_checker", {"action": "compare"}, "baseline"),
        ("/inference/v1/abort_requests", {}, "request_ids"),
        ("/pause?mode=stop", {}, "mode"),
        ("/pause?clear_caches=false", {}, "clear_caches"),
        ("/sleep?level=3", {}, "level"),
        ("/wake_up?tags=gpu", {}, "tags.0"),
    ],
)
async def test_a_misspelt_or_impossible_request_is_refused_by_its_field(path, body, field):
    recorded = fleet()
    async with front(recorded) as (client, _):
        answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert [problem["field"] for problem in answer.json()["problems"]] == [field]
    assert recorded.updates.calls == []


async def test_a_method_of_the_workers_cannot_be_called_and_the_answer_says_what_can():
    async with front(fleet()) as (client, _):
        answer = await client.post("/collective_rpc", json={"method": "reset_weights"})
    assert answer.status_code == 403
    assert "/update_weights" in answer.json()["problems"][0]["message"]


async def test_engines_that_hold_different_weights_are_no_checksum():
    recorded = fleet()
    recorded.controls.answers["weight_checksums"] = FleetError("engines hold different weights in 1 tensors")
    async with front(recorded) as (client, _):
        answer = await client.post("/weight_checker", json={"action": "checksum"})
    assert (answer.status_code, "different weights" in answer.text) == (503, True)


async def test_a_pause_shows_in_every_place_where_one_looks():
    recorded = fleet()
    recorded.pausing.paused = True
    async with front(recorded) as (client, _):
        assert (await client.get("/ready")).json() == {"ready": True, "paused": True}
        assert (await client.get("/is_paused")).json() == {"is_paused": True}
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert "\nrollout_paused 1.0" in (await client.get("/metrics")).text
        assert (await client.get("/get_world_size?include_dp=false")).json() == {"world_size": 1}
        assert (await client.get("/weight_info")).json() == {"weight_version": "0"}


async def test_no_secret_is_in_what_the_server_says_of_itself():
    said = {"VLLM_X": "say its-the-token, its-the-admin"}
    info = {"vllm_config": {"model_config": {"hf_token": "hf_abcdef"}}, "vllm_env": said, "system_env": {}}
    recorded = fleet(server_info=info)
    secrets = {"token": SecretStr("its-the-token"), "admin_token": SecretStr("its-the-admin")}
    recorded.config = recorded.config.model_copy(update=secrets)
    async with front(recorded) as (client, _):
        headers = {"Authorization": "Bearer its-the-admin"}
        answer = await client.get("/server_info?config_format=json", headers=headers)
    assert answer.status_code == 200, answer.text
    assert "hf_abcdef" not in answer.text
    assert "its-the-token" not in answer.text
    assert "its-the-admin" not in answer.text


def test_a_setting_is_hidden_by_its_name_and_a_secret_wherever_it_stands():
    info = {"tokenizer": "path", "HF_TOKEN": "abc", "api_key": "abc", "max_tokens": 5, "list": [("x secret42 y",)]}
    shown = {"tokenizer": "path", "HF_TOKEN": HIDDEN, "api_key": HIDDEN, "max_tokens": 5,
             "list": [[f"x {HIDDEN} y"]]}  # fmt: skip
    assert without_secrets(info, ["secret42", "x"]) == shown
