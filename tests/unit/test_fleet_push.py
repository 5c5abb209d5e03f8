"""Pushes that overlap: one at a time, and of those that wait only the newest is loaded."""

import asyncio
import errno
from types import SimpleNamespace

import pytest

from rollout_service.fleet import Fleet, FleetError
from rollout_service.protocol import WeightStatus
from rollout_service.weights import RefusedUpdate, WeightSet


@pytest.fixture
def fleet(monkeypatch, tmp_path):
    fleet = Fleet.__new__(Fleet)
    fleet._weights_lock, fleet._newest, fleet.loaded = asyncio.Lock(), {}, []
    weights = WeightSet("policy", {}, "float32")
    fleet.store = type("Store", (), {"sets": {"policy": weights}})
    for name in ("w", "bad", "1", "2", "3", "4"):
        (tmp_path / name).touch()
    monkeypatch.setattr("rollout_service.weights.file_tensors", lambda file: {})

    async def load_everywhere(of, version, file, checksum):
        await asyncio.sleep(0.05)
        if file.name == "bad":
            raise FleetError("no engine could load it")
        fleet.loaded.append(version)
        weights.status = WeightStatus(version=version, tensors=0, bytes=0, checksum="")
        return weights.status

    fleet._load_everywhere = load_everywhere
    return fleet


async def test_a_learner_that_pushes_faster_than_engines_load_skips_versions(fleet, tmp_path):
    pushes = [asyncio.create_task(fleet.push("policy", version, tmp_path / str(version))) for version in (1, 2, 3, 4)]
    statuses = await asyncio.gather(*pushes)
    assert fleet.loaded == [1, 4]
    assert [status.skipped for status in statuses] == [False, True, True, False]


async def test_a_push_that_fails_does_not_stand_in_the_way_of_the_next_try(fleet, tmp_path):
    with pytest.raises(FleetError):
        await fleet.push("policy", 7, tmp_path / "bad")
    assert (await fleet.push("policy", 3, tmp_path / "w")).version == 3
    with pytest.raises(RefusedUpdate, match="versions only grow"):
        await fleet.push("policy", 3, tmp_path / "w")


async def test_a_version_that_the_disk_has_no_room_for_is_not_published(fleet, tmp_path):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    del fleet._load_everywhere  # the fleet's own
    fleet.state = SimpleNamespace(keep=no_room, folder=tmp_path)
    with pytest.raises(RefusedUpdate, match="No space left") as refused:
        await fleet.push("policy", 1, tmp_path / "w")
    assert refused.value.status == 507
    assert fleet.store.sets["policy"].status.version == 0
