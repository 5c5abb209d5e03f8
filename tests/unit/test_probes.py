"""/ping, /load, /version: what load balancers and clients of vLLM ask."""

import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from front import StubFleet, front

from rollout_service.http.routes import probes
from rollout_service.protocol import INTERFACE_VERSION


async def test_a_ping_is_answered_as_health_is():
    async with front(StubFleet()) as (client, app):
        health = await client.get("/health")
        for answer in (await client.get("/ping"), await client.post("/ping"), await client.post("/ping", content=b"x")):
            assert (answer.status_code, answer.content) == (200, health.content)
        app.state.stopping.set()
        assert [(await client.get(path)).status_code for path in ("/health", "/ping")] == [503, 503]


async def test_the_load_is_what_the_engines_have_to_do():
    fleet = StubFleet()
    async with front(fleet) as (client, _):
        assert (await client.get("/load")).json() == {"server_load": 0}
        fleet.members = [SimpleNamespace(load=3), SimpleNamespace(load=4)]
        assert (await client.get("/load")).json() == {"server_load": 7}


async def test_the_versions_are_vllms_ours_and_the_interfaces():
    async with front(StubFleet()) as (client, _):
        answer = (await client.get("/version")).json()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", answer["version"])
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{answer["rollout_service"]}"\n' in pyproject
    assert answer["interface"] == INTERFACE_VERSION


def test_either_wheel_of_vllm_is_found(monkeypatch):
    installed = version("pytest")
    monkeypatch.setattr(probes, "WHEELS", ("no-such-package", "pytest"))
    assert probes.vllm_version() == installed
    monkeypatch.setattr(probes, "WHEELS", ("no-such-package",))
    assert probes.vllm_version() is None
