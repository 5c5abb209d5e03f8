"""The command line: what is wrong is named before anything loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from drafters.settings import read_command_line
from rl_loop.cli import main
from rl_loop.config import TrainConfig

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


def test_flags_go_over_the_demos_file():
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


def test_the_configuration_imports_no_torch():
    check = "import sys, rl_loop.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=DEMO.parents[2]).returncode == 0
