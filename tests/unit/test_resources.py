"""Missing resources: a start that this machine has no room for is refused, and a measurement takes turns on one GPU."""

from itertools import product

import pytest
from rich.progress import Progress

from rollout_service.config import ServiceConfig
from rollout_service.engine.step_costs import Measured, StepKind
from rollout_service.evaluation.audit import audit
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.calibrate import _measure, calibrate
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare import compare
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.resources import Demand, check_machine, demands_of, shortfall


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
    too_many = (
        r"2 engine\(s\) of 1 GPU\(s\) each need 2, but there are 1 on this machine; lower engines or engine.tensor"
    )
    with pytest.raises(ValueError, match=too_many):
        check_machine(config, "cuda")
    check_machine(config, "cuda", turns=1)
    with pytest.raises(ValueError, match=r"engines_at_once, engine.tensor_parallel_size: 2 engine"):
        check_machine(config, "cuda", turns=2)
    wide = ServiceConfig(model="m", engine={"tensor_parallel_size": 2})
    with pytest.raises(ValueError, match=r"^engine.tensor_parallel_size: 1 engine\(s\) of 2 GPU\(s\) each need 2"):
        check_machine(wide, "cuda", turns=1)
    monkeypatch.setattr("rollout_service.fleet.resources.gpus", lambda: 0)
    with pytest.raises(ValueError, match=r"engine.device: is cuda, but torch finds no GPU"):
        check_machine(config, "cuda", turns=1)


def test_engines_on_gpus_need_a_core_each_and_too_few_cores_are_refused(monkeypatch):
    monkeypatch.setattr("rollout_service.fleet.resources.gpus", lambda: 8)
    with pytest.raises(ValueError, match=r"^engines: 3 engine\(s\) of 1 core\(s\) each need 3, but there are 2"):
        check_machine(ServiceConfig(model="m", engines=3), "cuda")


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
    (two,) = demands_of(ServiceConfig(model="m", engines=2), "cpu")
    assert shortfall(two, [{"CPU": 1.0}, {"CPU": 1.0}]) is None


class OneAtATime:
    """An engine of a measurement that takes the only GPU while it runs."""

    running: list[str] = []  # noqa: RUF012
    most = 0

    def __init__(self, config):
        self.drafter, self.fleet, self.runner = config.drafter, self, "v2"

    async def start(self):
        self.running.append(self.drafter.kind)
        OneAtATime.most = max(OneAtATime.most, len(self.running))

    async def stop(self):
        if self.drafter.kind in self.running:
            self.running.remove(self.drafter.kind)

    async def measure(self, plan):
        assert self.drafter.kind in self.running
        measured = Measured(drafted=[4] * 3 if plan.responses else [], accepted=[3, 2, 1] if plan.responses else [])
        for size, k in product(plan.batch_sizes, plan.draft_lengths or [0]):
            measured.seconds[StepKind(size, k)] += [0.01 * (1 + k)]
            measured.first[StepKind(size, k)] += [0.02]
        return measured


@pytest.mark.parametrize(("number", "at_once"), [(1, 1), (2, 2)])
async def test_calibration_ends_one_engine_before_the_next_where_gpus_hold_only_one(number, at_once, monkeypatch):
    monkeypatch.setattr("rollout_service.fleet.resources.gpus", lambda: number)
    monkeypatch.setattr("rollout_service.evaluation.calibrate.resolve_device", lambda device: "cuda")
    monkeypatch.setattr("rollout_service.evaluation.calibrate.EngineArm", OneAtATime)
    monkeypatch.setattr("rollout_service.evaluation.calibrate.read_prompts", lambda model, file: [[1]])
    monkeypatch.setattr(OneAtATime, "most", 0)
    config = CalibrateConfig(model="m", drafter={"kind": "mtp"}, prompts=__file__, batch_sizes=[1, 4], rounds=2)
    turns = await _measure(config, Progress(disable=True))
    assert (OneAtATime.most, OneAtATime.running) == (at_once, [])
    plain, drafting = turns.costs([1, 4], draft_tokens=3)
    assert plain.seconds == [pytest.approx([0.01, 0.01])]
    assert [row[0] for row in drafting.seconds] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert turns.acceptance == [0.75, 0.5, 0.25]
