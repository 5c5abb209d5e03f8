"""A small soak: what `tests/benchmarks/soak.py` does with a million groups, without judging times and memory."""

import sqlite3
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from soak import Sample, Soak, growth


@pytest.fixture
def small_bounds(monkeypatch):
    monkeypatch.setattr("rollout_service.queue.database.LOG_ROWS", 400)
    monkeypatch.setattr("rollout_service.queue.database.REMEMBERED", 400)
    monkeypatch.setattr("rollout_service.fleet.alarms.FALLS_KEPT", 70)
    monkeypatch.setattr("rollout_service.fleet.alarms.ALARMS_KEPT", 20)
    monkeypatch.setattr("rollout_service.fleet.pushes.DRAFTERS_KEPT", 40)
    monkeypatch.setattr("rollout_service.fleet.pushes.locate", None)  # monkeypatch restores what the soak sets


async def test_disk_and_stored_records_do_not_grow_with_the_number_of_groups(tmp_path, small_bounds):
    soak = Soak(tmp_path, engines=2)
    samples = await soak.run(groups=3000, versions=300)
    assert [sample.groups for sample in samples] == list(range(150, 3001, 150))
    assert [found for found in growth(samples) if found.startswith("disk")] == []
    with sqlite3.connect(soak.file) as database:
        tables = ("log", "acknowledged", "groups", "requests", "results", "leases")
        rows = [database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]
    assert rows == [400, 400, 0, 0, 0, 0]
    background, fleet = soak.app.state.background, soak.fleet
    assert background.running == {}
    assert len(fleet.pushes.drafter_since) == 40
    assert len(fleet.alarms.raised) == 20
    assert len(fleet.alarms._fallen) <= 70
    assert [len(member.actor.counts.rows()) for member in fleet.members] == [65, 65]
    assert all(member.load == 0 for member in fleet.members)


def test_growth_is_reported():
    flat = [Sample(i, 100.0, 10.0, {"send": 0.01}) for i in range(20)]
    assert growth(flat) == []
    for changes in ({"memory": 5.0}, {"disk": 1.0}, {"seconds": 0.002}):
        samples = [
            Sample(
                i,
                100.0 + i * changes.get("memory", 0.0),
                10.0 + i * changes.get("disk", 0.0),
                {"send": 0.01 + i * changes.get("seconds", 0.0)},
            )
            for i in range(20)
        ]
        (found,) = growth(samples)
        assert found.startswith("send" if "seconds" in changes else next(iter(changes)))
