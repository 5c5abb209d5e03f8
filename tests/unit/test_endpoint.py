"""Endpoints and how clients reach them: IPv6, this machine, proxies. Real sockets are used where they matter."""

import ast
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import rl_toys as toys

from drafters.settings import read_command_line
from rl_loop.cli import train
from rl_loop.config import TrainConfig
from rollout_service.client import AsyncRolloutClient, EndpointError, RolloutClient, RolloutError
from rollout_service.client.route import proxy_of
from rollout_service.endpoint import checked_endpoint, is_loopback
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.protocol import WeightsStatus, WeightStatus

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = WeightsStatus(
    policy=WeightStatus(version=3, tensors=1, bytes=1, checksum=""), drafter=None, dtype="float32", shared_memory="/no"
).model_dump_json()
REMOTE = "http://rollouts.invalid:8000"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for scheme in ("http", "https", "all", "no"):
        for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            monkeypatch.delenv(name, raising=False)


@contextmanager
def serving(status=200, body=WEIGHTS, host="127.0.0.1", kind="application/json"):
    """A server that gives every request the same answer. Yields its port and the list of requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    server = Server((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def version(endpoint):
    with RolloutClient(endpoint, timeout=5.0) as client:
        return client.weights().policy.version


async def version_async(endpoint):
    async with AsyncRolloutClient(endpoint, timeout=5.0) as client:
        return (await client.weights()).policy.version


# --- addresses ---


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000",
        "https://a.b",
        "http://[::1]:8107",
        "http://user:pa:ss@[fd00::2]",
        "http://a:1/gateway/x",
    ],
)
def test_a_valid_address_is_kept_unchanged(url):
    assert checked_endpoint(url) == url


@pytest.mark.parametrize(
    ("url", "how_to_write_it"),
    [
        ("http://::1:8107", "in brackets: http://[::1]:8107"),
        ("http://::1", "in brackets: http://[::1]"),
        ("https://fd00::2:8000/v1", "in brackets: https://[fd00::2]:8000"),
        ("127.0.0.1:8000", "must begin with http:// or https://"),
        ("ftp://a", "must begin with http:// or https://"),
        ("http://a:99999", "write it like http://127.0.0.1:8000"),
        ("http://a:eight", "write it like http://127.0.0.1:8000"),
        ("http://[::1", "write it like"),
        ("http://:8000", "names no host"),
    ],
)
def test_an_invalid_address_is_refused_with_the_right_form(url, how_to_write_it):
    with pytest.raises(EndpointError) as refused:
        RolloutClient(url)
    assert how_to_write_it in str(refused.value)


@pytest.mark.parametrize("config_type", [TrainConfig, CompareConfig, AuditConfig])
def test_every_command_refuses_a_wrong_endpoint_before_it_starts(config_type, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1"}\n')
    flags = ["--model", "m", "--endpoint", "http://::1:8107"] + (
        ["--prompts", str(file)] if config_type is CompareConfig else []
    )
    with pytest.raises(SystemExit) as ended:
        read_command_line(config_type, "command", flags)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "endpoint" in said
    assert "http://[::1]:8107" in said


async def test_the_clients_reach_a_service_on_ipv6():
    with serving(host="::1") as (port, _):
        assert version(f"http://[::1]:{port}") == 3
        assert await version_async(f"http://[::1]:{port}") == 3


# --- proxies ---


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "localhost", "LOCALHOST", "::1", "::ffff:127.0.0.1", "0.0.0.0"]
)
def test_this_machine_is_known_by_all_its_names(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "128.0.0.1", "localhost.example.org", "fd00::1", "example.org"])
def test_other_machines_are_not_taken_for_this_one(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_this_machine_is_never_reached_through_a_proxy(variable, monkeypatch):
    with serving(status=502, body="no such host") as (proxy_port, through_proxy), serving() as (port, _):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy_port}")
        assert version(f"http://127.0.0.1:{port}") == 3
        assert version(f"http://localhost:{port}") == 3
        assert await version_async(f"http://127.0.0.1:{port}") == 3
    assert through_proxy == []


@pytest.mark.parametrize("url", ["socks5://127.0.0.1:1", "socks4://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_does_not_matter_for_this_machine(url, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", url)
    with serving() as (port, _):
        assert version(f"http://127.0.0.1:{port}") == 3


async def test_another_machine_is_reached_through_the_proxy_and_its_errors_name_the_proxy(monkeypatch):
    html = "<html><h1>502 Bad Gateway</h1>\n</html>"
    with serving(status=502, body=html, kind="text/html") as (port, through_proxy):
        monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{port}")
        with pytest.raises(RolloutError) as answered:
            version(REMOTE)
        with pytest.raises(RolloutError) as answered_async:
            await version_async(REMOTE)
    assert through_proxy == [f"{REMOTE}/v1/weights"] * 2
    for error in (answered.value, answered_async.value):
        assert error.status == 502
        assert f"proxy http://127.0.0.1:{port} of HTTP_PROXY" in str(error)
        assert "rollouts.invalid into no_proxy" in str(error)
        assert "502 Bad Gateway" in str(error)
        assert "secret" not in str(error)


def test_a_missing_proxy_is_named(monkeypatch):
    monkeypatch.setenv("all_proxy", "127.0.0.1:9")
    with pytest.raises(httpx.ConnectError, match=r"proxy http://127\.0\.0\.1:9 of all_proxy"):
        version(REMOTE)


@pytest.mark.parametrize("no_proxy", ["*", "rollouts.invalid", ".invalid", "a,rollouts.invalid:8000"])
def test_no_proxy_is_obeyed(no_proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_of(REMOTE) is None
    RolloutClient(REMOTE).http.close()


@pytest.mark.parametrize(
    ("proxy", "what_to_do"),
    [
        ("socks5://me:secret@10.0.0.1:1080", "pip install 'httpx[socks]'"),
        ("socks4://10.0.0.1:1080", "use an http or socks5 proxy"),
    ],
)
def test_a_command_names_the_variable_of_a_proxy_that_cannot_be_used(proxy, what_to_do, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setattr("rollout_service.client.route.find_spec", lambda package: None)
    monkeypatch.setattr("rl_loop.training.load_tokenizer", lambda config: toys.character_tokenizer())
    assert train(["--model", "m", "--output", str(tmp_path / "run"), "--endpoint", REMOTE]) == 2
    said = capsys.readouterr().err
    assert f"ALL_PROXY={proxy.replace('me:secret@', '')}" in said
    assert what_to_do in said
    assert "no_proxy" in said
    assert "secret" not in said


@pytest.mark.parametrize("folder", ["drafters", "rollout_service", "rl_loop", "deploy"])
def test_everything_in_the_project_connects_through_the_client(folder):
    connecting = {f"httpx.{name}" for name in ("get", "post", "delete", "request", "stream", "Client", "AsyncClient")}
    connecting |= {"requests.get", "requests.post", "request.urlopen", "urllib.request.urlopen"}
    found = {
        file.name
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in connecting
    }
    assert found == ({"rollout_client.py", "async_client.py"} if folder == "rollout_service" else set())
