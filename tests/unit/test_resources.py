"""Missing resources: on one machine the start is refused; in a cluster the command says what it lacks and waits."""

import asyncio

import pytest

from rollout_service.config import ServiceConfig
from rollout_service.evaluation.audit import audit
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.calibrate import calibrate
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare import compare
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.resources import Demand, check_machine, demand_of, missing_is_said, shortfall


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Two cores, one GPU, and no Ray."""

    def started(**arguments):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", started)
    monkeypatch.setattr("rollout_service.fleet.resources.machine_cores", lambda: 2)
    monkeypatch.setattr("rollout_service.fleet.resources.gpus", lambda: 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"engine": {"cores": 4}}, r"engines, engine.cores: 1 engine\(s\) of 4 core\(s\) each need 4, but there are 2"),
        ({"engines": 2, "engine": {"cores": 2}}, r"2 engine\(s\) of 2 core\(s\) each need 4, but there are 2"),
        ({"engines": 3}, r"engines: 3 engine\(s\) of 1 core\(s\) each need 3, but there are 2 on this machine"),
    ],
)
def test_a_service_that_needs_more_cores_than_there_are_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Fleet(
            ServiceConfig(
                model="never looked for", **(fields | {"engine": {"device": "cpu"} | fields.get("engine", {})})
            )
        )


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    config = ServiceConfig(model="m", engines=2)
    with pytest.raises(ValueError, match=r"2 engine\(s\) of 1 GPU\(s\) each need 2, but there are 1 on this machine"):
        check_machine(config, "cuda")
    check_machine(config, "cuda", turns=1)
    with pytest.raises(ValueError, match=r"engine.tensor_parallel_size: 2 engine"):
        check_machine(config, "cuda", turns=2)
    monkeypatch.setattr("rollout_service.fleet.resources.gpus", lambda: 0)
    with pytest.raises(ValueError, match=r"engine.device: is cuda, but torch finds no GPU"):
        check_machine(config, "cuda", turns=1)


@pytest.mark.parametrize(
    ("command", "config_type", "more"),
    [
        (compare, CompareConfig, {"drafters": [{"kind": "ngram"}]}),
        (audit, AuditConfig, {}),
        (calibrate, CalibrateConfig, {"drafter": {"kind": "mtp"}}),
    ],
)
def test_engines_that_take_turns_share_the_cores_and_none_may_ask_for_more(command, config_type, more, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    fields = {"model": "never looked for", "prompts": tmp_path / "prompts.jsonl", **more}
    with pytest.raises(SystemExit, match=r"engine.cores: 1 engine\(s\) of 3 core\(s\) each need 3, but there are 2"):
        command(config_type(engine={"device": "cpu", "cores": 3}, **fields))
    check_machine(ServiceConfig(model="m", engine={"cores": 2}), "cpu", turns=5)


def test_an_engine_needs_its_share_on_one_node():
    demand = Demand("engine.cores", 1, 4, "CPU")
    assert shortfall(demand, [{"CPU": 4.0}]) is None
    missing = shortfall(demand, [{"CPU": 2.0}, {"CPU": 2.0}, {"GPU": 1.0}])
    assert missing is not None
    assert "there are 4 (2 + 2 + 0 by node)" in missing
    assert shortfall(demand_of(ServiceConfig(model="m", engines=2), "cpu"), [{"CPU": 1.0}, {"CPU": 1.0}]) is None


async def test_a_growing_cluster_is_waited_for_and_what_it_lacks_is_printed_once(monkeypatch, caplog):
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    looks = []
    monkeypatch.setattr("ray.nodes", lambda: looks.append(1) or nodes)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("rollout_service.fleet.resources.LOOK_EVERY", 0.001)

    async def until(count):
        while len(looks) < count:
            await asyncio.sleep(0.001)

    config = ServiceConfig(model="m", engines=3, engine={"cores": 2}, ray_address="auto")
    async with asyncio.timeout(5.0):
        with missing_is_said(config, "cpu"):
            await until(3)
            nodes += nodes
            await until(6)
            nodes += nodes
            await until(9)
    waited = [record.message for record in caplog.records if "waiting for it to grow" in record.message]
    there = [message.split("there are ")[1].split(" in the cluster")[0] for message in waited]
    assert there == ["2", "4 (2 + 2 by node)"]
    assert "2 are free in the cluster at present" in caplog.text


async def test_a_single_machine_is_not_waited_for(monkeypatch):
    looks = []
    monkeypatch.setattr("ray.nodes", lambda: looks.append(1) or [])
    with missing_is_said(ServiceConfig(model="m"), "cpu"):
        await asyncio.sleep(0.01)
    assert not looks, "there is no cluster to ask"
