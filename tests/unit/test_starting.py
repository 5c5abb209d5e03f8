"""A starting service: its answers until its engines are in service, and a trainer that waits for it."""

import socket
import threading
import time

import httpx
import pytest
import rl_toys as toys
from rich.console import Console
from test_client import silent

from rl_loop.preflight import PreflightError, wait_until_ready
from rollout_service.client import RolloutClient
from rollout_service.http.starting import Starting


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def starting(listener):
    starting = Starting(listener)
    starting.start()
    yield starting
    starting.end()


def url_of(listener):
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def waiting(endpoint, tmp_path, seconds):
    """The trainer's error when it gives up, and after how many seconds it came."""
    settings = toys.config(tmp_path, endpoint=endpoint, ready_timeout=seconds)
    began = time.monotonic()
    with RolloutClient(endpoint) as client, pytest.raises(PreflightError) as ended:
        wait_until_ready(client, settings, Console(quiet=True))
    return str(ended.value), time.monotonic() - began


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/ready"), ("GET", "/v1/weights"), ("POST", "/v1/rollouts")]
)
def test_every_path_is_answered_with_503_and_when_to_try_again_until_the_engines_are_in_service(
    starting, listener, method, path
):
    answer = httpx.request(method, url_of(listener) + path, json={}, trust_env=False)
    assert answer.status_code == 503
    assert "starting" in answer.json()["error"]
    assert float(answer.headers["retry-after"]) > 0


def test_openais_routes_answer_503_in_openais_form(starting, listener):
    answer = httpx.get(url_of(listener) + "/v1/models", trust_env=False)
    assert answer.status_code == 503
    assert "starting" in answer.json()["error"]["message"]


def test_a_connection_during_the_handover_waits_for_the_real_server(starting, listener):
    url, served = url_of(listener), []
    with httpx.Client(trust_env=False) as client:
        assert client.get(url).status_code == 503
        starting.end()
        listener.settimeout(10)
        late = threading.Thread(target=lambda: served.append(client.get(url, timeout=10)))
        late.start()
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        late.join()
    assert [answer.status_code for answer in served] == [200]


def test_a_half_received_request_does_not_delay_the_service(starting, listener):
    with socket.create_connection(listener.getsockname()) as slow, socket.create_connection(listener.getsockname()):
        slow.sendall(b"POST /v1/weights/policy?version=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nabc")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 503")
        began = time.monotonic()
        starting.end()
        assert time.monotonic() - began < 5


def test_a_trainer_waits_ready_timeout_for_a_starting_service(starting, listener, tmp_path):
    message, seconds = waiting(url_of(listener), tmp_path, 1.5)
    assert "starting" in message
    assert 1.5 <= seconds < 5


def test_a_trainer_waits_no_longer_for_a_port_that_accepts_and_never_answers(tmp_path):
    with silent() as (url, _):
        message, seconds = waiting(url, tmp_path, 1.5)
    assert "no answer within" in message
    assert 1.5 <= seconds < 5
