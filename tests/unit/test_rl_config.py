"""The command line of `rl-loop train`: errors are named before anything loads."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drafters.settings import read_command_line
from rl_loop.cli import main
from rl_loop.config import TrainConfig
from rl_loop.losses.grpo import GRPO
from rl_loop.losses.gspo import GSPO
from rl_loop.losses.registry import LOSSES

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "train.toml"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--completions", "1"], "completions"),
        (["--prompts_per_step", "5000"], "prompts_per_step"),
        (["--sampling.temperature", "0"], "sampling.temperature"),
        (["--sampling.top_p", "0"], "sampling.top_p"),
        (["--betas", "[0.9,1.0]"], "betas"),
        (["--minibatches", "99", "--prompts_per_step", "4", "--completions", "2"], "minibatches"),
        (["--endpoint", "localhost:8000"], "endpoint"),
        (["--device", "tpu"], "device"),
        (["--replay", "/no/such/folder"], "replay"),
        (["--task.kind", "jsonl"], "path is needed"),
        (["--task.path", "/no/such/file"], "task.path"),
        (["--task.answer_pattern", "no group"], "task.answer_pattern"),
        (["--task.reward", "no colon"], "task.reward"),
    ],
)
def test_a_wrong_value_is_named_at_parse_time(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        read_command_line(TrainConfig, "rl-loop train", ["--model", "m", *flags])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_the_policy_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        read_command_line(TrainConfig, "rl-loop train", [])
    assert "model" in capsys.readouterr().err


def test_a_misspelt_name_in_the_file_is_an_error(tmp_path, capsys):
    file = tmp_path / "train.toml"
    file.write_text('model = "m"\n[task]\nnmae = "chain_sum"\n')
    with pytest.raises(SystemExit):
        read_command_line(TrainConfig, "rl-loop train", ["--config", str(file)])
    assert "task.nmae" in capsys.readouterr().err


def test_flags_override_the_demos_file():
    flags = ["--config", str(DEMO), "--endpoint", "http://node:9000", "--steps", "3", "--tensorboard"]
    config = read_command_line(TrainConfig, "rl-loop train", flags)
    assert (config.endpoint, config.steps, config.tensorboard) == ("http://node:9000", 3, True)
    assert config.task.params["max_terms"] == 4


def test_dry_run_prints_the_configuration_but_not_the_token(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", "m", "--token", "secret", "--dry-run"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert '"model": "m"' in printed
    assert "secret" not in printed


@pytest.mark.parametrize(("argv", "shown"), [(["--help"], "train"), (["train", "--help"], "--prompts_per_step")])
def test_help_at_both_levels(argv, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    "module",
    [
        "rl_loop.cli, rl_loop.config",
        "drafters.cli, drafters.training.config",
        "rollout_service.cli, rollout_service.config, rollout_service.evaluation.compare_config, "
        "rollout_service.evaluation.audit_config, rollout_service.evaluation.calibrate_config",
    ],
)
def test_the_configuration_imports_no_torch(module):
    check = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'vllm', 'ray'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=DEMO.parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def dry_run(capsys, *flags):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", "m", *flags, "--dry-run"])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_dry_run_shows_the_defaults_of_the_loss_the_correction_and_the_mode(capsys):
    printed = dry_run(capsys)
    assert printed["loss"] == GRPO().model_dump()
    assert (printed["correction"]["kind"], printed["reward_processes"]) == ("truncated", 0)
    printed = dry_run(capsys, "--loss.kind", "gspo", "--loss.clip_high", "0.1", "--mode", "async")
    assert printed["loss"] == GSPO(clip_high=0.1).model_dump()
    assert printed["reward_processes"] == 1
    printed = dry_run(capsys, "--loss.kind", "own.losses:mine", "--loss.options", '{"scale": 2}')
    assert (printed["loss"]["kind"], printed["loss"]["options"]) == ("own.losses:mine", {"scale": 2})
    printed = dry_run(capsys, "--correction.kind", "icepop", "--correction.high", "3")
    assert (printed["correction"]["low"], printed["correction"]["high"]) == (0.5, 3.0)


def test_help_lists_each_losss_own_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for loss in LOSSES:
        (said,) = re.findall(rf"^ +{loss().kind}: (.*)$", printed, re.MULTILINE)
        for name, field in loss.model_fields.items():
            differs = name != "kind" and field.default != GRPO.model_fields[name].default
            assert (f"{name} {field.default}" in said) == differs


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--loss.kind", "gsp"], "loss.kind: must be a built-in loss or a package.module:function (got 'gsp')"),
        (["--loss", "dapo"], "loss: is a section; its kind is one of grpo, dr_grpo, dapo, gspo, cispo (got 'dapo')"),
        (["--loss.kind", "gspo", "--loss.clip_high", "-1"], "loss.clip_high: Input should be greater than or equal to"),
        (
            ["--loss.options", '{"a": 1}'],
            "loss.options: kind = 'grpo' has no such field; it belongs to package.module:function",
        ),
        (
            ["--correction.low", "0.1"],
            "correction.low: kind = 'truncated' has no such field; it belongs to icepop",
        ),
        (["--correction.kind", "icepop", "--correction.low", "6"], "correction.low: 6.0 must be below high, 5.0"),
        (
            ["--correction.proximal", "sampling"],
            'correction.proximal: this kind has no effect with proximal = "sampling": choose another kind',
        ),
        (["--loss_average", "token"], "--loss_average: its name is loss.average now"),
        (["--drafter.kind", "mtp"], "--drafter.kind: its name is online_drafter.kind now"),
        (["--mode", "async", "--reward_processes", "0"], "reward_processes: asynchronous training needs at least 1"),
        (["--reward_timeout", "5"], "reward_timeout: has no effect with reward_processes = 0"),
        (
            ["--dynamic_sampling_rounds", "5"],
            "dynamic_sampling_rounds: has no effect with loss.dynamic_sampling",
        ),
    ],
)
def test_what_a_kind_or_mode_does_not_read_is_refused_in_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", "m", *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rl-loop train: {said}")
