"""Every command says in one line, before it works, that it cannot write its result or lacks the device."""

import pytest
import rl_toys as toys

from drafters import cli as drafters_command
from drafters.devices import choose_device
from drafters.files.checkpoint_folder import read_config
from drafters.files.durable import check_folder
from rl_loop.cli import train
from rollout_service.evaluation.audit import audit
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.calibrate import calibrate
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare import compare
from rollout_service.evaluation.compare_config import CompareConfig


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "a file"
    file.write_text('{"text": "a"}\n', encoding="utf-8")
    return file


def test_a_result_that_cannot_be_written_is_reported_before_any_work(file, capsys):
    of_engines = {"model": "never looked for", "engine": {"device": "cpu"}}
    for command, config in (
        (compare, CompareConfig(prompts=file, output=file, **of_engines)),
        (audit, AuditConfig(output=file / "below", **of_engines)),
        (calibrate, CalibrateConfig(prompts=file, output=file / "out", drafter={"kind": "mtp"}, **of_engines)),
    ):
        with pytest.raises(SystemExit, match=f"rollout-service {command.__name__}: output: {file} is a file; choose a"):
            command(config)
    below = CalibrateConfig(prompts=file, output=file.parent, drafter={"kind": "mtp"}, **of_engines)
    with pytest.raises(SystemExit, match=r"output: .* is a folder; give a file"):
        calibrate(below)
    assert train(["--model", "never looked for", "--output", str(file)]) == 1
    assert f"rl-loop train: output: {file} is a file; choose a folder" in capsys.readouterr().err
    flags = ["--kind", "eagle3", "--policy", "never looked for", "--data", str(file), "--out", str(file / "below")]
    assert drafters_command.train(flags) == 2
    assert f"drafters train: out: {file} is a file; choose a folder" in capsys.readouterr().err


def test_an_unwritable_folder_is_reported_and_the_check_creates_no_folder(tmp_path, monkeypatch):
    check_folder(tmp_path / "new" / "below", "output")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"^output: {tmp_path} cannot be written to; choose another folder"):
        check_folder(tmp_path / "new", "output")


def test_both_trainers_report_a_missing_gpu(file, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    said = "device: cuda, and torch finds no GPU on this machine; use auto or cpu"
    assert train(["--model", "m", "--device", "cuda", "--output", str(tmp_path / "run")]) == 1
    assert f"rl-loop train: {said}" in capsys.readouterr().err
    flags = [
        "--kind",
        "eagle3",
        "--policy",
        "m",
        "--data",
        str(file),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cuda",
    ]
    assert drafters_command.train(flags) == 2
    assert f"drafters train: {said}" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("auto").type == "cuda"
    with pytest.raises(ValueError, match=r"device: cuda:2, and torch finds 2 GPU\(s\), counted from 0"):
        choose_device("cuda:2")


def test_rows_that_need_engines_of_their_own_on_a_gpu_are_not_refused(file, monkeypatch):
    """How drafts are sampled is fixed when an engine on a GPU starts, so each way gets an engine."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    of_engines = {"model": "never looked for", "engine": {"device": "cuda"}, "output": file.parent / "out"}
    ways = {"verification": ["standard", "block"], "draft_sampling": ["greedy", "probabilistic"]}
    monkeypatch.setattr("rollout_service.evaluation.audit.fetch_models", refuse)
    monkeypatch.setattr("rollout_service.evaluation.compare.fetch_models", refuse)
    with pytest.raises(SystemExit, match="goes on"):
        audit(AuditConfig(drafters=[{"kind": kind} for kind in ("none", "ngram", "mtp")], **of_engines, **ways))
    with pytest.raises(SystemExit, match="goes on"):
        compare(CompareConfig(prompts=file, drafters=[{"kind": "mtp"} | ways], **of_engines))


def refuse(*_):
    raise ValueError("goes on")


def test_an_endpoint_that_is_not_there_is_named(file):
    file.write_text('{"prompt_token_ids": [1]}\n', encoding="utf-8")
    config = CompareConfig(model="never looked for", prompts=file, endpoint="http://127.0.0.1:9", output=file.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout_service.evaluation.compare.read_prompts", lambda *_: [[1]])
        with pytest.raises(SystemExit, match=r"compare: endpoint: http://127.0.0.1:9: .*onnect"):
            compare(config)


def test_a_checkpoints_configuration_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1', encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: not JSON: "):
        read_config(tmp_path)


def test_a_recomputation_on_a_missing_gpu_is_refused_before_an_engine_starts(file, monkeypatch, tmp_path):
    toys.llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    common = {"model": str(tmp_path / "model"), "engine": {"device": "cpu"}, "recomputation": {"device": "cuda:1"}}
    for command, config in (
        (compare, CompareConfig(prompts=file, output=tmp_path / "out", **common)),
        (audit, AuditConfig(output=tmp_path / "out", **common)),
    ):
        said = f"rollout-service {command.__name__}: recomputation.device: cuda:1, and torch finds no GPU"
        with pytest.raises(SystemExit, match=said):
            command(config)
