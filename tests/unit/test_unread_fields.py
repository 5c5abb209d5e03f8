"""Unread fields: a field that the chosen kind or device does not read is an error."""

import pytest

from drafters.registry import KINDS, DrafterConfig, make_drafter
from drafters.settings import read_command_line
from drafters.training.config import TrainDrafterConfig
from rl_loop.config import TrainConfig
from rollout_service.config import ServiceConfig
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.fleet.resources import check_machine

OF_A_DRAFTER = ["--kind", "eagle3", "--policy", "m", "--out", "o", "--data", __file__]
TRAIN, SERVE = (TrainConfig, ["--model", "m"]), (ServiceConfig, ["--model", "m"])
TRAIN_DRAFTER = TrainDrafterConfig, OF_A_DRAFTER


def lines(command, flags, capsys):
    config_type, needed = command
    with pytest.raises(SystemExit) as stop:
        read_command_line(config_type, "command", [*needed, *flags])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (SERVE, ["--engine.device", "cuda", "--engine.cores", "2"], "engine.cores: has no effect with device = 'cuda'"),
        (
            SERVE,
            ["--engine.device", "cpu", "--engine.gpu_memory_utilization", "0.5"],
            "engine.gpu_memory_utilization: ",
        ),
        (
            SERVE,
            ["--weights.running", "drain", "--weights.kv_cache", "keep"],
            "weights.kv_cache: has no effect with ru",
        ),
        (
            SERVE,
            ["--ray_timeout", "9"],
            "ray_timeout: has no effect with a Ray cluster of its own, without ray_address",
        ),
        (SERVE, ["--weights.policy", "keep"], "--weights.policy: its name is weights.running now"),
        (SERVE, ["--drafter.kind", "mtp", "--drafter.model", "x"], "drafter.model: has no effect with kind = 'mtp'"),
        (
            SERVE,
            ["--drafter.kind", "ngram", "--drafter.model", "x"],
            "drafter.model: has no effect with kind = 'ngram'",
        ),
        (
            SERVE,
            ["--drafter.kind", "mtp", "--drafter.prompt_lookup_max", "9"],
            "drafter.prompt_lookup_max: has no effec",
        ),
        (
            TRAIN,
            ["--task.kind", "jsonl", "--task.path", __file__, "--task.size", "9"],
            "task.size: has no effect with k",
        ),
        (TRAIN, ["--task.path", __file__], "task.path: has no effect with kind = 'reasoning_gym'"),
        (TRAIN, ["--task.grader", "math"], "task.grader: has no effect with kind = 'reasoning_gym'"),
        (
            TRAIN,
            ["--task.reward", "a:b", "--task.answer_pattern", "(.*)"],
            "task.answer_pattern: has no effect with re",
        ),
        (TRAIN, ["--task.chat", "--task.prompt_suffix", "?"], "task.prompt_suffix: has no effect with chat = true"),
        (
            TRAIN,
            ["--online_drafter.training.start_below", "0.9"],
            "online_drafter.training.start_below: has no effect w",
        ),
        (TRAIN, ["--online_drafter.training.top_k", "9"], "online_drafter.training.top_k: has no effect with loss ="),
        (TRAIN_DRAFTER, ["--training.top_k", "9"], "training.top_k: has no effect with loss = 'soft_cross_entropy'"),
        (TRAIN_DRAFTER, ["--head.hidden_size", "64"], "head.hidden_size: has no effect with kind = 'eagle3'"),
        (
            TRAIN_DRAFTER,
            ["--init", "i", "--head.vocabulary_size", "9"],
            "head.vocabulary_size: has no effect with init",
        ),
    ],
)
def test_a_field_without_effect_gives_one_line(command, flags, said, capsys):
    (line,) = lines(command, flags, capsys)
    assert line.startswith(f"command: {said}")


@pytest.mark.parametrize(
    ("config_type", "fields"), [(CompareConfig, {"prompts": __file__}), (AuditConfig, {})], ids=["compare", "audit"]
)
def test_drafters_to_be_measured_are_checked_in_the_same_way(config_type, fields):
    with pytest.raises(ValueError, match=r"drafter\.model: has no effect with kind = 'ngram'"):
        config_type(model="m", drafters=[{"kind": "ngram", "model": "x"}], **fields)


def test_the_device_that_auto_finds_is_checked_before_engines_start(monkeypatch):
    monkeypatch.setattr("rollout_service.fleet.resources.gpus", lambda: 1)
    config = ServiceConfig(model="m", engine={"cores": 1})
    check_machine(config, "cpu", turns=1)
    with pytest.raises(ValueError, match=r"^engine\.cores: has no effect with device = 'cuda'"):
        check_machine(config, "cuda")


def test_a_drafter_is_turned_off_only_by_its_kind():
    drafter = make_drafter(DrafterConfig(kind="none", model="x", prompt_lookup_max=9, draft_tokens=5))
    assert drafter.speculative_config() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_can_be_written_and_read_again(kind):
    drafter = {"kind": kind, "model": "m" if KINDS[kind].has_folder else None}
    config = ServiceConfig(model="m", drafter=drafter)
    assert ServiceConfig.model_validate_json(config.model_dump_json()) == config
    train = TrainConfig(model="m", loss={"kind": "dapo"}, correction={"kind": "icepop"}, mode="async")
    assert TrainConfig.model_validate_json(train.model_dump_json()) == train
