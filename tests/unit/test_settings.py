"""A command's configuration: TOML, flags over it, and errors that name the field before anything starts."""

import json

import pytest

from drafters.drafter import DrafterConfig
from drafters.registry import make_drafter
from drafters.settings import read_command_line
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.engine_arguments import names_engine_arguments
from rollout_service.vllm_arguments import known_arguments

TOML = """
model = "folder"
port = 9000
[drafter]
kind = "ngram"
draft_tokens = 5
"""


@pytest.fixture
def toml(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text(TOML)
    return str(file)


def test_flags_go_over_the_file_and_the_file_over_the_defaults(toml):
    config = read_command_line(ServiceConfig, "launch", ["--config", toml, "--drafter.draft_tokens", "2"])
    assert (config.port, config.drafter.kind, config.drafter.draft_tokens) == (9000, "ngram", 2)
    assert config.engines == 1


def test_dry_run_prints_the_resolved_configuration(toml, capsys):
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--config", toml, "--port", "1", "--dry-run"])
    assert stop.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["port"] == 1
    assert printed["drafter"]["draft_tokens"] == 5


def test_a_secret_is_not_printed(toml, capsys):
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--config", toml, "--token", "hush", "--dry-run"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["token"] == "**********"
    assert "hush" not in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "70000"], "port"),
        (["--drafter.draft_tokens", "0"], "drafter.draft_tokens"),
        (["--drafter.kind", "oracle"], "unknown kind 'oracle'"),
        (["--drafter.kind", "eagle3"], "drafter.model"),
        (["--host", "0.0.0.0"], "token"),
        (["--engine.dtype", "float8"], "engine.dtype"),
        (["--engine.vllm", '{"speculative_config": {"synthetic_acceptance_rates": [1.0]}}'], "drafter.verification"),
        (["--engine.vllm", '{"logits_processors": ["a.B"]}'], "engine.vllm.logits_processors"),
        (["--engine.vllm", '{"override_generation_config": {"top_p": 0.5}}'], "give them in each request"),
        (["--engine.vllm", '{"no_such": 1}'], "engine.vllm.no_such: vLLM has no engine argument of this name"),
        (["--engine.vllm", '{"max_model_len": 64}'], "set engine.max_model_len instead"),
    ],
)
def test_a_wrong_value_ends_the_command_and_names_the_field(toml, capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--config", toml, *arguments])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_a_value_that_vllm_refuses_is_said_to_be_of_the_argument():
    config = ServiceConfig(model="m", engine={"vllm": {"block_size": 7}})
    with (
        pytest.raises(ValueError, match=r"engine\.vllm\.block_size: vLLM does not start with what is given: not 7"),
        names_engine_arguments(config),
    ):
        raise ValueError("not 7")
    with pytest.raises(ValueError, match=r"^not 7$"), names_engine_arguments(ServiceConfig(model="m")):
        raise ValueError("not 7")


def test_vllms_arguments_are_known_without_its_import():
    known = known_arguments()
    assert {"block_size", "enable_prefix_caching", "enable_log_requests"} <= known
    assert "create_engine_config" not in known
    EngineConfig(vllm={"block_size": 32})


@pytest.mark.parametrize("option", ["typical_acceptance", "rejection_sample_method", "posterior_threshold", "lenience"])
def test_a_relaxed_acceptance_is_refused_and_the_lossless_options_are_named(tmp_path, capsys, option):
    file = tmp_path / "lossy.toml"
    file.write_text(f'model = "m"\n[drafter]\nkind = "ngram"\n{option} = 0.5\n')
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--config", str(file)])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert option in printed
    assert 'verification = "standard" or "block"' in printed


def test_a_draft_model_of_another_vocabulary_is_refused():
    drafter = make_drafter(DrafterConfig(kind="draft_model", model="m"))
    drafter.check({"vocab_size": 160}, {"vocab_size": 160})
    with pytest.raises(ValueError, match=r"drafter\.model.*512 tokens and the policy 160"):
        drafter.check({"vocab_size": 160}, {"vocab_size": 512})


def test_an_unknown_name_in_the_file_is_an_error(tmp_path, capsys):
    file = tmp_path / "wrong.toml"
    file.write_text('model = "m"\nprot = 8000\n')
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--config", str(file)])
    assert stop.value.code == 2
    assert "prot" in capsys.readouterr().err


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit):
        read_command_line(ServiceConfig, "launch", ["--help"])
    text = capsys.readouterr().out
    assert "--engine.max_model_len" in text
    assert "tokens drafted per step" in text
