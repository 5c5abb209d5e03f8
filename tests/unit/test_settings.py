"""A command's configuration: a TOML file, flags that override it, and errors that name the field before a start."""

import codecs
import json
from pathlib import Path

import pytest

from drafters.files.checkpoint_folder import checkpoint_names, read_config
from drafters.registry import DrafterConfig, make_drafter
from drafters.settings import read_command_line
from drafters.training.config import TrainDrafterConfig
from rl_loop.config import TrainConfig
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.engine.arguments import names_engine_arguments
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.vllm_arguments import known_arguments

TOML = """
model = "folder"
port = 9000
[drafter]
kind = "ngram"
draft_tokens = 5
"""
NOT_UTF8 = "is not UTF-8; save the file as UTF-8, for example with"
MTP = ["--drafter.kind", "mtp"]


@pytest.fixture
def toml(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text(TOML)
    return str(file)


def test_flags_override_the_file_and_the_file_overrides_the_defaults(toml):
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
        (["--engine.vllm", '{"override_generation_config": {"top_p": 0.5}}'], "give others in each request"),
        (["--engine.vllm", '{"no_such": 1}'], "engine.vllm.no_such: vLLM has no engine argument of this name"),
        (["--engine.vllm", '{"max_model_len": 64}'], "set engine.max_model_len instead"),
    ],
)
def test_a_wrong_value_ends_the_command_and_names_the_field(toml, capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--config", toml, *arguments])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_a_value_that_vllm_refuses_is_reported_with_its_argument():
    config = ServiceConfig(model="m", engine={"vllm": {"block_size": 7}})
    with (
        pytest.raises(ValueError, match=r"engine\.vllm\.block_size: vLLM does not start with this: not 7"),
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
    drafter.check({"vocab_size": 160}, {"vocab_size": 160}, [])
    with pytest.raises(ValueError, match=r"drafter\.model.*512 tokens and the policy 160"):
        drafter.check({"vocab_size": 160}, {"vocab_size": 512}, [])


def test_a_policy_that_declares_a_head_and_has_none_is_refused():
    drafter, declared = make_drafter(DrafterConfig(kind="mtp")), {"num_nextn_predict_layers": 1}
    drafter.check(declared, None, ["model.norm.weight", "mtp.fc.weight"])
    with pytest.raises(ValueError, match=r"drafter\.kind.*declares an MTP layer, and its files hold none"):
        drafter.check(declared, None, ["model.norm.weight"])


@pytest.mark.parametrize(
    "lost", ["mtp.fc.", "mtp.norm.", "mtp.layers.0.self_attn.q_proj.", "mtp.layers.0.mlp.experts."]
)
def test_a_head_that_lacks_a_module_is_refused_by_its_name(lost):
    policy = Path(__file__).parents[2] / "deploy" / "demo" / "models" / "policy"
    drafter, names = make_drafter(DrafterConfig(kind="mtp")), checkpoint_names(policy)
    drafter.check(read_config(policy), None, names)
    with pytest.raises(ValueError, match=f"lack {lost[:-1]}: an engine"):
        drafter.check(read_config(policy), None, [name for name in names if not name.startswith(lost)])


def test_an_unknown_name_in_the_file_is_an_error(tmp_path, capsys):
    file = tmp_path / "wrong.toml"
    file.write_text('model = "m"\nprot = 8000\n')
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--config", str(file)])
    assert stop.value.code == 2
    assert "prot" in capsys.readouterr().err


def lines(config_type, arguments, capsys):
    """The lines that a wrong command line prints."""
    with pytest.raises(SystemExit) as stop:
        read_command_line(config_type, "command", arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.removesuffix("\n").split("\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--learnin_rate", "1"], "--learnin_rate: there is no such flag; did you mean --learning_rate?"),
        (["--learning-rate=1"], "--learning-rate: there is no such flag; did you mean --learning_rate?"),
        (["--task.seeed", "1"], "--task.seeed: there is no such flag; did you mean --task.seed?"),
        (["--taks.seed", "1"], "--taks.seed: there is no such flag; did you mean --task.seed or --seed?"),
        (
            ["--learn", "1"],
            "--learn: there is no such flag",
        ),  # abbreviations are refused: a new flag could change their meaning
        (["--zzz", "1"], "--zzz: there is no such flag"),
        (["extra"], "'extra' belongs to no flag"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_a_misspelt_flag_gives_one_line_with_the_nearest_names(arguments, said, capsys):
    assert lines(TrainConfig, ["--model", "m", *arguments], capsys) == [f"command: {said}"]


def test_a_misspelt_field_of_the_file_gives_one_line_with_the_nearest_names(tmp_path, capsys):
    file = tmp_path / "wrong.toml"
    file.write_text(
        'model = "m"\nlearnin_rate = 1\n[sampling]\nsteps = 2\n[online_drafter.training]\nwhenn = "every"\n',
        encoding="utf-8",
    )
    assert lines(TrainConfig, ["--config", str(file)], capsys) == [
        "command: sampling.steps: there is no such field; did you mean steps?",
        "command: online_drafter.training.whenn: there is no such field; did you mean online_drafter.training.when?",
        "command: learnin_rate: there is no such field; did you mean learning_rate?",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "port: Input should be less than or equal to 65535 (got '70000')"),
        (
            ["--host", "::"],
            "token: listening on :: needs a token; set token, token_file or the environment variable "
            'ROLLOUT_SERVICE_TOKEN, or listen on host = "127.0.0.1"',
        ),
        (
            ["--drafter.kind", "oracle"],
            "drafter.kind: unknown kind 'oracle'; the kinds are none, ngram, draft_model, eagle3, mtp",
        ),
        (["--weights", "keep"], "weights: a table is written as JSON, '{\"name\": 1}', a list as '[1, 2]'"),
        (["--weights", "5"], "weights: is a section; its fields are running, kv_cache (got 5)"),
        (
            ["--engine.vllm", "block_size"],
            "engine.vllm: a table is written as JSON, '{\"name\": 1}', a list as '[1, 2]'",
        ),
    ],
)
def test_a_wrong_value_gives_one_line_with_the_field_what_is_allowed_and_the_value(arguments, said, capsys):
    assert lines(ServiceConfig, ["--model", "m", *arguments], capsys) == [f"command: {said}"]


def test_a_wrong_field_of_several_types_gives_one_line(toml, capsys):
    (said,) = lines(ServiceConfig, ["--config", toml, "--drafter.schedule", "5"], capsys)
    assert said.startswith("command: drafter.schedule: Input should be")
    assert said.endswith("(got [5])")


def test_neither_a_secret_nor_a_whole_configuration_is_printed_with_an_error(tmp_path, capsys):
    file = tmp_path / "wrong.toml"
    file.write_text('model = "m"\nhost = "::"\ntoken = 31337\n', encoding="utf-8")
    assert lines(ServiceConfig, ["--config", str(file)], capsys) == ["command: token: Input should be a valid string"]


def test_a_byte_order_mark_is_legal(tmp_path):
    file = tmp_path / "service.toml"
    file.write_bytes(codecs.BOM_UTF8 + b'model = "m"')
    assert read_command_line(ServiceConfig, "launch", ["--config", str(file)]).model == "m"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# caf\u00e9".encode("latin1"), f"line 1: byte 0xe9 {NOT_UTF8} `iconv -f LATIN1 -t UTF-8`"),
        ('model = "m"'.encode("utf-16"), f"line 1: byte 0xff {NOT_UTF8} `iconv -f UTF-16 -t UTF-8`"),
        (b"steps = ", "Invalid value (at end of document)"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_not_toml_gives_one_line(content, said, tmp_path, capsys):
    file = tmp_path / "wrong.toml"
    if content is not None:
        file.write_bytes(content)
    assert lines(ServiceConfig, ["--config", str(file)], capsys) == [f"command: --config {file}: {said}"]


@pytest.mark.parametrize(
    ("config_type", "arguments", "said"),
    [
        (CompareConfig, ["--concurrency", "0"], "concurrency.0: Input should be greater than 0 (got"),
        (CompareConfig, ["--draft_tokens", "[3,0]"], "draft_tokens.1: Input should be greater than 0 (got"),
        (CalibrateConfig, [*MTP, "--batch_sizes", "0"], "batch_sizes.0: Input should be greater than 0 (got"),
        (
            CalibrateConfig,
            [*MTP, "--batch_sizes", "[65]"],
            "batch_sizes: all are above engine.max_num_seqs, which is 64",
        ),
    ],
)
def test_measuring_with_nothing_is_refused(config_type, arguments, said, capsys):
    (printed,) = lines(config_type, ["--model", "m", "--prompts", __file__, *arguments], capsys)
    assert printed.startswith(f"command: {said}")


def test_a_section_that_refuses_a_field_gives_the_fields_full_name(capsys):
    schedule = ["--drafter.kind", "mtp", "--drafter.schedule", "/nonexistent.json"]
    (said,) = lines(ServiceConfig, ["--model", "m", *schedule], capsys)
    assert said.startswith("command: drafter.schedule: /nonexistent.json: No such file or directory; give such a file")
    adaptive = ["--online_drafter.training.when", "adaptive", "--online_drafter.training.stop_above", "0.5"]
    (said,) = lines(TrainConfig, ["--model", "m", *adaptive], capsys)
    assert said == "command: online_drafter.training.stop_above: 0.5 is below start_below, 0.95"


@pytest.mark.parametrize(
    ("config_type", "more"),
    [(TrainConfig, ["--model", "m"]), (TrainDrafterConfig, ["--kind", "mtp", "--policy", "m", "--out", "o"])],
)
def test_a_trainer_has_no_more_threads_than_there_are_cores(config_type, more, capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    more = [*more, "--data", __file__] if config_type is TrainDrafterConfig else more
    assert read_command_line(config_type, "command", [*more, "--threads", "2"]).threads == 2
    said = "command: threads: more than the 2 core(s) of this machine (got '3')"
    assert lines(config_type, [*more, "--threads", "3"], capsys) == [said]


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit):
        read_command_line(ServiceConfig, "launch", ["--help"])
    text = capsys.readouterr().out
    assert "--engine.max_model_len" in text
    assert "tokens drafted per step" in text
