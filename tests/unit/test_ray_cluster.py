"""Ray cluster: which one a command uses. No Ray is started: a replacement of `ray.init` records its arguments."""

import os

import pytest

from rollout_service.fleet.member import FleetError
from rollout_service.fleet.ray_cluster import start_ray


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of `ray.init`."""
    calls = []
    monkeypatch.setattr("ray.init", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)
    return calls


def test_a_local_cluster_is_started_whatever_cluster_the_environment_names(calls, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    start_ray(None, engine_logs=False)
    assert calls[0]["address"] == "local"
    assert "RAY_ADDRESS" not in os.environ, "processes started from here would join that cluster"


def test_the_configured_cluster_is_joined_without_declaring_resources(calls, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    start_ray("192.0.2.2:6379", engine_logs=False)
    assert calls[0]["address"] == "192.0.2.2:6379"
    assert "num_cpus" not in calls[0]


@pytest.mark.parametrize("error", [ConnectionError("no Ray instance was found"), ValueError("Invalid address format")])
def test_an_address_without_a_cluster_is_named(calls, monkeypatch, error):
    def refuse(**arguments):
        raise error

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(
        FleetError, match=r"ray_address: cannot join a Ray cluster at nowhere: .*; leave ray_address out"
    ):
        start_ray("nowhere", engine_logs=False)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes"), "set RAY_TMPDIR to a folder with a short path"),
        (
            PermissionError("[Errno 13] Permission denied: '/.ray'"),
            r"home folder \(HOME, .*make both writable",
        ),
    ],
)
def test_folders_that_ray_cannot_use_are_named_with_the_variable_to_set(monkeypatch, error, advice):
    def refuse(**arguments):
        raise error

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(FleetError, match=f"Ray cannot start here: .*{advice}"):
        start_ray(None, engine_logs=False)
