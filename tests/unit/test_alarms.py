"""Every alarm is raised once by its cause, with a log line, a metric, and an entry that names the versions."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from drafters.registry import DrafterConfig, make_drafter
from rollout_service.config import AlarmConfig
from rollout_service.engine.loading import Loaded
from rollout_service.fleet.alarms import Alarms
from rollout_service.protocol import WeightStatus
from rollout_service.tensor_bytes import file_checksum
from rollout_service.transports import RefusedUpdate, Update
from rollout_service.transports.transport import check_received
from rollout_service.vllm_plugin.weight_digests import digest, held_digests
from rollout_service.weights.versions import WeightStore

SENT = "a" * 64


def loaded(changed=3):
    return Loaded(pause=0.1, changed=changed, modules=3)


def row(policy, drafter, accepted, steps=1000):
    return {"policy_version": policy, "drafter_version": drafter, "draft_steps": steps, "drafted": 3 * steps,
            "accepted": accepted, "accepted_by_position": [accepted, 0, 0]}  # fmt: skip


@pytest.fixture
def alarms():
    counted = []
    alarms = Alarms(AlarmConfig(acceptance_fall=0.2, draft_steps=500), counted.append)
    alarms.counted = counted
    return alarms


def test_an_update_that_changed_everything_raises_no_alarm(alarms):
    alarms.after_push("drafter", 4, 7, is_new=True, loaded={0: loaded(), 1: loaded()})
    alarms.after_push("policy", 5, 7, is_new=None, loaded={0: loaded(changed=0)})
    assert alarms.raised == alarms.counted == []


def test_an_engine_that_keeps_its_old_drafter_raises_an_alarm(alarms, caplog):
    with caplog.at_level(logging.ERROR):
        alarms.after_push("drafter", 4, 7, is_new=True, loaded={0: loaded(), 1: loaded(changed=0)})
    (alarm,) = alarms.raised
    assert (alarm.kind, alarm.of, alarm.policy_version, alarm.drafter_version) == ("not_changed", "drafter", 4, 7)
    assert "drafter version 7" in alarm.message
    assert "engine 1" in alarm.message
    assert alarm.message in caplog.text
    assert alarms.counted == ["not_changed"]


def test_a_new_version_of_an_unchanged_drafter_raises_an_alarm_and_of_an_unchanged_policy_does_not(alarms):
    alarms.after_push("policy", 5, 7, is_new=False, loaded={0: loaded(changed=0)})
    assert alarms.raised == []
    alarms.after_push("drafter", 5, 8, is_new=False, loaded={0: loaded(changed=0)})
    (alarm,) = alarms.raised
    assert alarm.kind == "not_changed"
    assert "drafter version 8 holds the same tensors" in alarm.message


@pytest.mark.parametrize("of", ["policy", "drafter"])
def test_bytes_that_an_engine_read_differently_raise_an_alarm(of, alarms):
    alarms.different_bytes(of, 5, 8, engine=1, error="read other bytes")
    (alarm,) = alarms.raised
    assert (alarm.kind, alarm.of) == ("checksum", of)


def test_a_fall_of_acceptance_after_a_push_raises_one_alarm_that_names_the_versions(alarms, caplog):
    rows = [row(1, 1, 2400), row(2, 1, 2300), row(3, 1, 1500, steps=400)]
    alarms.check_acceptance(rows)
    assert alarms.raised == [], "rates of 0.80 and 0.77, and one of too few steps to judge"
    rows[2] = row(3, 1, 1500)
    with caplog.at_level(logging.ERROR):
        alarms.check_acceptance(rows)
        alarms.check_acceptance([*rows, row(4, 2, 1450)])
    (alarm,) = alarms.raised
    assert (alarm.kind, alarm.of, alarm.policy_version, alarm.drafter_version) == ("acceptance_fell", "policy", 3, 1)
    assert "fell by 35%" in alarm.message
    assert "policy version 3 and drafter version 1" in alarm.message
    assert alarm.message in caplog.text
    assert alarms.counted == ["acceptance_fell"]


def test_an_alarm_says_whether_the_push_was_of_the_drafter_or_of_the_policy(alarms):
    alarms.check_acceptance([row(3, 1, 2000, steps=500), row(3, 1, 400, steps=500), row(3, 2, 600)])
    assert [(a.of, a.drafter_version) for a in alarms.raised] == [("drafter", 2)]


def test_the_alarms_kept_are_bounded_and_an_old_fall_is_not_reported_again(alarms):
    for version in range(300):
        alarms.after_push("drafter", version, version, is_new=False, loaded={})
    assert [alarm.policy_version for alarm in alarms.raised] == list(range(200, 300)), "the newest"
    assert len(alarms.counted) == 300, "all are counted"
    rows = [row(1, 1, 2400), row(2, 1, 600), {**row(0, 0, 10), "policy_version": None, "drafter_version": None}]
    alarms.check_acceptance(rows)
    for version in range(100):
        alarms.after_push("drafter", version, version, is_new=False, loaded={})
    alarms.check_acceptance(rows)
    assert alarms.counted.count("acceptance_fell") == 1


@pytest.fixture
def store(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    tensors = {"mtp.fc.weight": torch.arange(6.0), "model.norm.weight": torch.ones(3)}
    save_file({n: t.bfloat16() for n, t in tensors.items()}, tmp_path / "policy" / "model.safetensors")
    store = WeightStore(tmp_path / "policy", make_drafter(DrafterConfig(kind="mtp")), "float32")
    yield store
    store.close()


def update(store, values, name="mtp.fc.weight"):
    file = store.folder.new_file()
    save_file({name: values}, file)
    return Update(file, file_checksum(file))


def test_a_push_is_compared_with_the_weights_in_service(store):
    same, other = update(store, torch.arange(6.0)), update(store, torch.arange(6.0) + 1)
    assert store.differs("drafter", same) is None, "the checkpoint itself may be pushed again"
    assert store.differs("drafter", other) is True
    store.sets["drafter"].status = WeightStatus(version=1, tensors=1, bytes=24, checksum=same.checksum)
    assert store.differs("drafter", same) is False
    assert store.differs("drafter", other) is True
    assert store.differs("policy", same) is None


def test_bytes_that_changed_on_the_way_are_refused():
    with pytest.raises(RefusedUpdate, match="push again"):
        check_received("b" * 64, sent=SENT)
    check_received(SENT, sent=SENT)
    check_received(SENT, sent=None)


def test_a_digest_changes_with_one_bit_and_with_the_order():
    values = torch.arange(10_000_000, dtype=torch.float32)
    changed, swapped = values.clone(), values.clone()
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(torch.inf))
    swapped[[0, 1]] = swapped[[1, 0]]
    rows = values.view(-1, 2000).roll(1, 0)
    assert len({digest(tensor) for tensor in (values, changed, swapped, rows)}) == 4
    assert digest(values) == digest(values.clone())
    assert digest(values[:7].bfloat16()) == digest(values[:7].bfloat16().clone())


def test_held_digests_name_the_modules_that_changed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.LayerNorm(2))
    before = held_digests(model)
    assert before.keys() == {"0", "2"}
    model[2].weight.data[0] += 1e-7
    after = held_digests(model)
    assert [name for name in after if after[name] != before[name]] == ["2"]


def test_a_packed_weight_is_compared_by_what_it_computes():
    layer = torch.nn.Linear(3, 2, bias=False)
    packed = layer.weight.detach().clone()
    layer.cpu_linear = lambda x, weight, bias: x @ packed.T
    layer.input_size, layer.weight = 3, torch.nn.Parameter(torch.empty(0))
    before = held_digests(layer)
    packed[1, 1] += 1e-3
    assert held_digests(layer) != before
