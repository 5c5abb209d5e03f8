"""Ray's token: a cluster of the service's own asks for it, and the service joins a cluster of others that does."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import free_port

RAY = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1"]
JOIN = """
import sys, time
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.ray_cluster import start_ray
try:
    start_ray(sys.argv[1], False)
except FleetError as error:
    sys.exit(str(error))
import ray
deadline = time.monotonic() + 60
while (nodes := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]) and time.monotonic() < deadline:
    time.sleep(0.5)
print("nodes:", nodes)
"""
OWN = """
import sys
from rollout_service.fleet.ray_cluster import start_ray
start_ray(None, False)
import ray
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A home folder for tokens, and for Ray's sockets, whose names must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(home: Path, **more: str) -> dict[str, str]:
    """A user whose home it is. Nothing of the tests' own user says where a token is."""
    home.mkdir(exist_ok=True)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return ours | {"HOME": str(home), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0", **more}


def joining(address: str, user: dict[str, str], nodes: int = 1) -> subprocess.CompletedProcess:
    """A driver that joins as the service does, and waits for this number of nodes."""
    return subprocess.run(
        [sys.executable, "-c", JOIN, address, str(nodes)], env=user, capture_output=True, text=True, timeout=120
    )


@contextlib.contextmanager
def running(command: list[str], user: dict[str, str], **streams: int) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, env=user, text=True, **streams)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def cluster(home) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a cluster of two nodes, and the environment of a user who has its token."""
    token, port = home / "token", free_port()
    token.write_text("of-the-cluster", encoding="utf-8")
    user = environment(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    address = f"127.0.0.1:{port}"
    head = [*RAY, "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    with running(head, user):
        health = [RAY[0], "health-check", "--address", address]
        for _ in range(30):
            if subprocess.run(health, env=user, capture_output=True).returncode == 0:
                break
        with running([*RAY, f"--address={address}", "--node-ip-address=127.0.0.1"], user):
            yield address, user


@pytest.mark.again
def test_the_service_joins_a_cluster_whose_token_it_has_and_says_what_is_missing_without(cluster, home):
    address, user = cluster
    joined = joining(address, user, nodes=2)
    assert joined.stdout.endswith("nodes: 2\n"), joined.stderr
    (home / "wrong").write_text("of-another-cluster", encoding="utf-8")
    for wrong in (environment(home / "other"), user | {"RAY_AUTH_TOKEN_PATH": str(home / "wrong")}):
        refused = joining(address, wrong)
        assert refused.returncode == 1
        assert f"ray_address: cannot join a Ray cluster at {address}: " in refused.stderr
        assert "if that one asks for a token, set RAY_AUTH_MODE=token" in refused.stderr


@pytest.mark.again
def test_a_cluster_of_the_services_own_asks_other_users_for_a_token(home):
    user = environment(home)
    with running([sys.executable, "-c", OWN], user, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        address = process.stdout.readline().strip()
        assert (home / ".ray" / "auth_token").is_file()
        assert "Unauthenticated" in joining(address, environment(home / "other")).stderr
        assert "nodes: 1" in joining(address, environment(home, RAY_AUTH_MODE="token")).stdout
        process.stdin.close()  # it ends in order, and its Ray with it
        process.wait(30)
