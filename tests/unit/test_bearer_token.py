"""The bearer token: the service and every client find it in a field, a file or the environment, and never print it."""

import json

import pytest

from drafters.settings import read_command_line
from rl_loop.config import TrainConfig
from rollout_service.bearer_token import VARIABLE
from rollout_service.config import ServiceConfig
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.compare_config import CompareConfig

COMMANDS = {
    ServiceConfig: ["--model", "m", "--host", "0.0.0.0"],
    TrainConfig: ["--model", "m"],
    CompareConfig: ["--model", "m", "--prompts", __file__, "--endpoint", "http://node:8000"],
    AuditConfig: ["--model", "m", "--endpoint", "http://node:8000"],
}
every_command = pytest.mark.parametrize("config_type", COMMANDS)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "token"
    file.write_text("of-the-file\n", encoding="utf-8")
    return str(file)


def token(config_type, *flags):
    return read_command_line(config_type, "command", [*COMMANDS[config_type], *flags]).token.get_secret_value()


@every_command
def test_every_command_finds_the_token_in_the_environment_and_the_configuration_overrides_it(
    config_type, file, monkeypatch
):
    monkeypatch.setenv(VARIABLE, "of-the-environment")
    assert token(config_type) == "of-the-environment"
    assert token(config_type, "--token_file", file) == "of-the-file"
    assert token(config_type, "--token", "given") == "given"
    monkeypatch.delenv(VARIABLE)
    assert token(config_type, "--token_file", file) == "of-the-file"


@every_command
def test_dry_run_shows_that_there_is_a_token_but_not_its_value(config_type, file, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "of-the-environment")
    for flags in ([], ["--token_file", file], ["--token", "given"]):
        with pytest.raises(SystemExit) as stop:
            read_command_line(config_type, "command", [*COMMANDS[config_type], *flags, "--dry-run"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert json.loads(printed)["token"] == "**********"
        assert not any(secret in printed for secret in ("of-the-environment", "of-the-file", "given"))


def test_without_a_token_there_is_none(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert TrainConfig(model="m").token is None
    monkeypatch.setenv(VARIABLE, "")
    assert TrainConfig(model="m").token is None


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (None, [], "token_file: {file}: No such file or directory"),
        (" \n", [], "token_file: {file} is empty; write the token into it"),
        ("hush", ["--token", "psst"], "token_file: its token differs from `token`; give only one of them"),
        ("hush", ["--token", ""], "token: Value should have at least 1 item after validation, not 0"),
    ],
)
def test_a_wrong_token_file_is_reported_without_its_content(content, flags, said, tmp_path, capsys):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--model", "m", "--token_file", str(file), *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"launch: {said.format(file=file)}\n"


def test_the_engines_of_a_service_with_a_token_do_not_get_the_token(file):
    config = ServiceConfig(model="m", host="0.0.0.0", token_file=file)
    told = config.for_engine()
    assert "of-the-file" not in json.dumps(told)
    assert ServiceConfig.model_validate(told).model == "m"
