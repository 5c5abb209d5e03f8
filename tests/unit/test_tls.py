"""TLS of the front: what is refused before it starts, and whom clients trust. Servers and sockets are real."""

import socket

import httpx
import pytest
import rl_toys as toys
from rich.console import Console
from tls_files import self_signed

from drafters.settings import read_command_line
from rl_loop.cli import train
from rl_loop.config import TrainConfig
from rl_loop.preflight import wait_until_ready
from rollout_service.bearer_token import VARIABLE
from rollout_service.client import AsyncRolloutClient, EndpointError, RolloutClient, RolloutError
from rollout_service.config import ServiceConfig, TLSConfig
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.http.starting import Starting


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return self_signed(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return self_signed(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def port(pair):
    """The port of a starting service with TLS: a real server, which answers 503."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        starting = Starting(listener, tls=TLSConfig(certificate=pair.certificate, key=pair.key))
        starting.start()
        yield listener.getsockname()[1]
        starting.end()


@pytest.fixture
def plain_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        starting = Starting(listener)
        starting.start()
        yield listener.getsockname()[1]
        starting.end()


def refusal(capsys, *flags):
    """What `launch` says to these flags before it does anything."""
    with pytest.raises(SystemExit) as stop:
        read_command_line(ServiceConfig, "launch", ["--model", "m", *flags])
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- what the service refuses ---


def test_a_public_address_without_tls_is_refused_unless_something_in_front_ends_it(pair, capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "secret")
    said = refusal(capsys, "--host", "0.0.0.0")
    assert said.startswith("launch: tls: listening on 0.0.0.0 needs TLS; set tls.certificate and tls.key, or tls.ended")
    for flags in (pair.flags, ["--tls.ended_by_proxy", "true"], ["--host", "127.0.0.1"]):
        read_command_line(ServiceConfig, "launch", ["--model", "m", "--host", "0.0.0.0", *flags])


def test_tls_does_not_replace_the_token(pair, capsys, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "launch: token: listening on 0.0.0.0 needs a token" in refusal(capsys, "--host", "0.0.0.0", *pair.flags)


def test_files_that_do_not_fit_are_named_before_the_service_starts(pair, other, tmp_path, capsys):
    locked = self_signed(tmp_path / "locked", password=b"hush")
    text = tmp_path / "text"
    text.write_text("no certificate\n", encoding="utf-8")
    certificate, key = pair
    for flags, said in {
        ("--tls.certificate", certificate): "tls.key: a certificate needs the file of its private key",
        ("--tls.key", key): "tls.certificate: a key needs the file of its certificate",
        ("--tls.certificate", "/none", "--tls.key", key): "tls.certificate: /none: No such file or directory",
        ("--tls.certificate", certificate, "--tls.key", tmp_path): f"tls.key: {tmp_path}: Is a directory",
        ("--tls.certificate", text, "--tls.key", key): f"tls.certificate: {text} holds no certificate in PEM format",
        ("--tls.certificate", certificate, "--tls.key", text): f"tls.key: {text} holds no private key in PEM format",
        ("--tls.certificate", locked.certificate, "--tls.key", locked.key): f"tls.key: {locked.key} holds no private "
        "key in PEM format, or one with a password",
        ("--tls.certificate", certificate, "--tls.key", other.key): f"tls.key: {other.key} belongs to another "
        f"certificate than {certificate}",
        (*pair.flags, "--tls.ended_by_proxy", "true"): "tls.ended_by_proxy: has no effect with a certificate of the",
    }.items():
        assert f"launch: {said}" in refusal(capsys, *map(str, flags))


def test_an_engine_does_not_get_the_fronts_files(pair):
    told = ServiceConfig(model="m", tls=TLSConfig(certificate=pair.certificate, key=pair.key)).for_engine()
    assert "tls" not in told
    assert ServiceConfig.model_validate(told).tls.scheme == "http"


# --- whom clients trust ---


async def test_a_client_with_the_authority_is_answered(port, pair):
    for endpoint in (f"https://127.0.0.1:{port}", f"https://localhost:{port}"):
        with RolloutClient(endpoint, ca_file=pair.certificate) as client, pytest.raises(RolloutError) as answered:
            client.weights()
        assert answered.value.status == 503
    async with AsyncRolloutClient(f"https://127.0.0.1:{port}", ca_file=pair.certificate) as client:
        with pytest.raises(RolloutError) as answered:
            await client.weights()
    assert answered.value.status == 503


async def test_a_client_without_the_authority_is_told_which_file_it_needs(port, other):
    for ca_file in (None, other.certificate):
        with (
            RolloutClient(f"https://127.0.0.1:{port}", ca_file=ca_file) as client,
            pytest.raises(EndpointError, match=r"CERTIFICATE_VERIFY_FAILED.*; set ca_file to the PEM file"),
        ):
            client.weights()
        async with AsyncRolloutClient(f"https://127.0.0.1:{port}", ca_file=ca_file) as client:
            with pytest.raises(EndpointError, match="set ca_file to the PEM file"):
                await client.weights()


def test_authorities_of_the_system_are_trusted_without_a_file(port, pair, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(pair.certificate))  # where OpenSSL looks for the system's
    with RolloutClient(f"https://127.0.0.1:{port}") as client, pytest.raises(RolloutError, match="starting"):
        client.weights()


def test_a_name_that_the_certificate_does_not_have_is_refused(port, pair):
    with (
        RolloutClient(f"https://127.1.2.3:{port}", ca_file=pair.certificate) as client,
        pytest.raises((EndpointError, httpx.ConnectError)),
    ):
        client.weights()


def test_https_to_a_plain_service_says_to_write_http(plain_port, pair):
    with (
        RolloutClient(f"https://127.0.0.1:{plain_port}", ca_file=pair.certificate) as client,
        pytest.raises(EndpointError, match="the service speaks plain http, so write http://"),
    ):
        client.weights()


def test_an_authority_for_a_plain_endpoint_is_refused(pair):
    with pytest.raises(EndpointError, match="ca_file has no effect with http; write https://"):
        RolloutClient("http://127.0.0.1:8000", ca_file=pair.certificate)


@pytest.mark.parametrize("config_type", [TrainConfig, CompareConfig, AuditConfig])
def test_every_client_command_checks_the_authority_before_it_starts(config_type, pair, tmp_path, capsys):
    flags = ["--model", "m", "--endpoint", "https://node:8000"]
    flags += ["--prompts", __file__] if config_type is CompareConfig else []
    assert read_command_line(config_type, "command", [*flags, "--ca_file", str(pair.certificate)]).ca_file
    (tmp_path / "text").write_text("no certificate\n", encoding="utf-8")
    for file, said in (("none", "No such file or directory"), ("text", "holds no certificate in PEM format")):
        with pytest.raises(SystemExit) as stop:
            read_command_line(config_type, "command", [*flags, "--ca_file", str(tmp_path / file)])
        assert stop.value.code == 2
        assert f"command: ca_file: {tmp_path / file}" in (printed := capsys.readouterr().err)
        assert said in printed


def test_a_trainer_does_not_wait_for_a_service_that_it_does_not_trust(port, tmp_path):
    endpoint = f"https://127.0.0.1:{port}"
    settings = toys.config(tmp_path, endpoint=endpoint, ready_timeout=600.0)
    with RolloutClient(endpoint) as client, pytest.raises(EndpointError, match="set ca_file"):
        wait_until_ready(client, settings, Console(quiet=True))


def test_the_trainers_command_ends_with_that_message(port, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rl_loop.training.load_tokenizer", lambda config: toys.character_tokenizer())
    monkeypatch.setattr("rl_loop.training.wait_until_ready", lambda client, config, console: client.weights())
    assert train(["--model", "m", "--output", str(tmp_path / "run"), "--endpoint", f"https://127.0.0.1:{port}"]) == 2
    assert "rl-loop train: endpoint: https://127.0.0.1:" in capsys.readouterr().err
