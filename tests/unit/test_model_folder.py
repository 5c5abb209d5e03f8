"""Model folders: an error names the field, the full path that was tried, and the reason."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from drafters import cli as drafters_command
from drafters.files.model_folder import resolve_model
from drafters.training.config import TrainDrafterConfig
from rl_loop.cli import train
from rollout_service.config import ServiceConfig
from rollout_service.evaluation.arms import fetch_models
from rollout_service.evaluation.audit import audit
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.calibrate import calibrate
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare import compare
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.fleet.fleet import Fleet


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))


def hub(monkeypatch, error):
    """A hub, or the connection to it, that gives this answer."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def test_a_missing_folder_is_reported_with_the_full_path_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^model: there is no folder /nowhere, and /nowhere is no Hugging Face name$"):
        resolve_model("/nowhere")
    tried = re.escape(f"(relative to {tmp_path}: {tmp_path}/some/relative/policy)")
    reason = (
        f"^policy: there is no folder some/relative/policy {tried}, and some/relative/policy is no Hugging Face name$"
    )
    with pytest.raises(ValueError, match=reason):
        resolve_model("some/relative/policy", "policy")


def test_an_unreachable_hub_is_reported(monkeypatch):
    hub(monkeypatch, LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known"))
    reason = r"^model: cannot reach the Hugging Face hub to fetch Qwen/Qwen3-8B, and it is not in the local cache, /.*"
    with pytest.raises(ValueError, match=reason + "there is no folder Qwen/Qwen3-8B"):
        resolve_model("Qwen/Qwen3-8B")


def test_a_name_that_the_hub_does_not_have_is_reported(monkeypatch):
    answer = SimpleNamespace(status_code=401, headers={}, request=None)
    hub(monkeypatch, RepositoryNotFoundError("Invalid username or password.", response=answer))
    with pytest.raises(
        ValueError, match=r"the Hugging Face hub answers 401 for Qwen/Qwen9: no public model .*HF_TOKEN"
    ):
        resolve_model("Qwen/Qwen9")


def test_a_cache_that_cannot_be_written_is_reported(monkeypatch):
    hub(monkeypatch, PermissionError("[Errno 13] Permission denied: '/cache'"))
    with pytest.raises(ValueError, match=r"cannot keep Qwen/Qwen3-8B in /.*Permission denied.*set HF_HOME to a folder"):
        resolve_model("Qwen/Qwen3-8B")


def test_a_folder_without_a_checkpoint_is_reported_and_so_is_a_file(tmp_path):
    with pytest.raises(ValueError, match=f"^model: {tmp_path} is no checkpoint: it needs config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model.safetensors is a file; give the checkpoint's folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").touch()
    (tmp_path / "prompts.jsonl").touch()
    assert resolve_model("~/policy") == tmp_path / "policy"
    assert ServiceConfig(model="m", state="~/state").state == tmp_path / "state"
    compared = CompareConfig(model="m", prompts="~/prompts.jsonl", output="~/report")
    assert (compared.prompts, compared.output) == (tmp_path / "prompts.jsonl", tmp_path / "report")
    with pytest.raises(ValueError, match="is the folder of `policy`"):
        TrainDrafterConfig(kind="eagle3", policy="~/policy", data="~/prompts.jsonl", out=tmp_path / "policy")
    assert ServiceConfig(model="m", state="~no-such-user/state").state == Path("~no-such-user/state")


def test_every_command_reports_a_missing_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n', encoding="utf-8")
    named = "model: there is no folder /nowhere, and"
    of_engines = {"model": "/nowhere", "engine": {"device": "cpu"}}
    with pytest.raises(ValueError, match=named):
        Fleet(ServiceConfig(**of_engines))
    for command, config in (
        (compare, CompareConfig(prompts=prompts, **of_engines)),
        (audit, AuditConfig(**of_engines)),
        (calibrate, CalibrateConfig(prompts=prompts, drafter={"kind": "mtp"}, **of_engines)),
    ):
        with pytest.raises(SystemExit, match=f"rollout-service {command.__name__}: {named}"):
            command(config)
    assert train(["--model", "/nowhere"]) == 1
    assert f"rl-loop train: {named}" in capsys.readouterr().err
    train_drafter = ["--kind", "eagle3", "--policy", "/nowhere", "--data", str(prompts), "--out", str(tmp_path / "out")]
    assert drafters_command.train(train_drafter) == 2
    assert "drafters train: policy: there is no folder /nowhere" in capsys.readouterr().err
    assert drafters_command.inspect(["/nowhere"]) == 2
    assert "drafters inspect: folder: there is no folder /nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [prompts], "no file was written"


def test_the_models_of_all_drafters_are_found_before_the_first_engine_starts(tmp_path):
    (tmp_path / "config.json").touch()
    config = CompareConfig(
        model=str(tmp_path), prompts=__file__, drafters=[{"kind": "ngram"}, {"kind": "eagle3", "model": "/nowhere"}]
    )
    with pytest.raises(ValueError, match=r"^drafters\.model: there is no folder /nowhere"):
        fetch_models(config.model, config.arms(), "cpu")
    with pytest.raises(SystemExit, match=r"drafters\.model: there is no folder /nowhere"):
        compare(config)
