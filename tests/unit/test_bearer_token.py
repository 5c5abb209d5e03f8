"""The bearer token: the service and every client find it in a field, a file or the environment, and never print it."""

import json

import pytest

from drafters.settings import read_command_line
from rl_loop.config import TrainConfig
from rollout_service.bearer_token import ADMIN_VARIABLE, VARIABLE
from rollout_service.config import ServiceConfig
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.serve import launch

COMMANDS = {
    ServiceConfig: ["--model", "m", "--host", "0.0.0.0", "--tls.ended_by_proxy", "true"],
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
    config = ServiceConfig(model="m", token_file=file)
    told = config.for_engine()
    assert "of-the-file" not in json.dumps(told)
    assert ServiceConfig.model_validate(told).model == "m"


def admin_token(*flags):
    config = read_command_line(ServiceConfig, "launch", [*COMMANDS[ServiceConfig], "--token", "secret", *flags])
    return config.admin_token and config.admin_token.get_secret_value()


def test_the_service_finds_its_admin_token_as_it_finds_its_token(file, monkeypatch):
    monkeypatch.delenv(ADMIN_VARIABLE, raising=False)
    assert admin_token() is None
    assert admin_token("--admin_token_file", file) == "of-the-file"
    monkeypatch.setenv(ADMIN_VARIABLE, "of-the-environment")
    assert admin_token() == "of-the-environment"
    assert admin_token("--admin_token_file", file) == "of-the-file"
    assert admin_token("--admin_token", "given") == "given"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--admin_token", "a"], "admin_token: without a token every route is open, so an admin token would guard"),
        (["--token", "a", "--admin_token", "a"], "admin_token: must differ from `token`; choose another one"),
        (["--token", "a", "--admin_token_file", "/none"], "admin_token_file: /none: No such file or directory"),
    ],
)
def test_an_admin_token_that_guards_nothing_is_refused(flags, said, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        read_command_line(ServiceConfig, "launch", ["--model", "m", *flags])
    assert said in capsys.readouterr().err


def test_a_launch_refuses_an_admin_token_of_the_environment_without_a_token(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv(ADMIN_VARIABLE, "hush")
    config = ServiceConfig(model="m")  # a measurement that starts an engine has no use for tokens
    with pytest.raises(SystemExit, match=f"{ADMIN_VARIABLE}: without a token every route is open") as stop:
        launch(config)
    assert "hush" not in str(stop.value)


def test_an_admin_token_is_neither_printed_nor_told_to_an_engine(file, capsys):
    flags = ["--model", "m", "--token", "secret", "--admin_token_file", file]
    with pytest.raises(SystemExit):
        read_command_line(ServiceConfig, "launch", [*flags, "--dry-run"])
    printed = capsys.readouterr().out
    assert json.loads(printed)["admin_token"] == "**********"
    assert "of-the-file" not in printed + json.dumps(read_command_line(ServiceConfig, "launch", flags).for_engine())
