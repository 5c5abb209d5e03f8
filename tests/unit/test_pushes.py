"""Overlapping pushes are loaded one at a time, and only the newest waiting one of a run. Who owns the weights."""

import asyncio
import errno
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from rollout_service.engine.loading import DifferentBytes, HalfLoaded, Loaded, WeightsFile
from rollout_service.fleet.member import FleetError, Member
from rollout_service.fleet.pushes import Pushes
from rollout_service.protocol import WeightStatus
from rollout_service.transports import RefusedUpdate, Update
from rollout_service.weights.state_folder import StateFolder
from rollout_service.weights.versions import WeightSet

SENT = "a" * 64


@pytest.fixture
def pushes(monkeypatch, tmp_path):
    """Pushes without real loading: every engine refuses a file named `bad`."""
    weights, loaded = WeightSet("policy", {}, "float32"), []
    pushes = Pushes(SimpleNamespace(sets={"policy": weights}), None, None, [])
    for name in ("w", "bad", "1", "2", "3", "4", "7"):
        (tmp_path / name).touch()
    monkeypatch.setattr("rollout_service.weights.versions.tensor_specs", lambda file: {})

    async def load_everywhere(of, version, update, run):
        await asyncio.sleep(0.05)
        if update.file.name == "bad":
            raise FleetError("no engine could load it")
        loaded.append(version)
        weights.status = WeightStatus(version=version, tensors=0, bytes=0, checksum="", run=run)
        return weights.status

    pushes._load_everywhere, pushes.loaded = load_everywhere, loaded
    return pushes


async def test_a_learner_that_pushes_faster_than_engines_load_skips_versions(pushes, tmp_path):
    tasks = [
        asyncio.create_task(pushes.push("policy", version, Update(tmp_path / str(version), SENT)))
        for version in (1, 2, 3, 4)
    ]
    statuses = await asyncio.gather(*tasks)
    assert pushes.loaded == [1, 4]
    assert [status.skipped for status in statuses] == [False, True, True, False]


async def test_a_failed_push_does_not_block_the_next_try(pushes, tmp_path):
    with pytest.raises(FleetError):
        await pushes.push("policy", 7, Update(tmp_path / "bad", SENT))
    assert (await pushes.push("policy", 3, Update(tmp_path / "w", SENT))).version == 3
    with pytest.raises(RefusedUpdate, match="versions only grow"):
        await pushes.push("policy", 3, Update(tmp_path / "w", SENT))


@pytest.mark.parametrize("other", ["b", None])
async def test_a_push_of_another_run_is_refused_and_the_answer_names_the_owner(pushes, tmp_path, other):
    await pushes.push("policy", 1, Update(tmp_path / "1", SENT), "a")
    with pytest.raises(RefusedUpdate, match="belongs to the run 'a', and this push") as refused:
        await pushes.push("policy", 2, Update(tmp_path / "2", SENT), other)
    assert refused.value.status == 409
    assert "--take_over" in refused.value.problems[0].message
    assert (await pushes.push("policy", 3, Update(tmp_path / "3", SENT), "a")).run == "a"
    assert pushes.loaded == [1, 3]


@pytest.mark.parametrize("other", ["b", None])
async def test_a_run_that_takes_over_owns_the_weights(pushes, tmp_path, other):
    await pushes.push("policy", 1, Update(tmp_path / "1", SENT), "a")
    assert (await pushes.push("policy", 2, Update(tmp_path / "2", SENT), other, take_over=True)).run == other
    if other is not None:
        with pytest.raises(RefusedUpdate, match="belongs to the run 'b', and this push is of the run 'a'"):
            await pushes.push("policy", 3, Update(tmp_path / "3", SENT), "a")


async def test_weights_without_an_owner_belong_to_the_first_run_that_pushes(pushes, tmp_path):
    await pushes.push("policy", 1, Update(tmp_path / "1", SENT))
    assert (await pushes.push("policy", 2, Update(tmp_path / "2", SENT), "a")).run == "a"


async def test_a_push_that_waits_is_refused_if_another_run_became_the_owner_meanwhile(pushes, tmp_path):
    """It also does not block the owner's push that waits behind it."""
    tasks = [
        asyncio.create_task(pushes.push("policy", version, Update(tmp_path / str(version), SENT), run))
        for version, run in ((1, "a"), (4, "b"), (2, "a"))
    ]
    first, foreign, second = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(foreign, RefusedUpdate)
    assert (first.version, second.version, second.skipped) == (1, 2, False)


async def test_a_run_that_ends_releases_only_its_own_weights(pushes, tmp_path):
    await pushes.push("policy", 1, Update(tmp_path / "1", SENT), "a")
    assert await pushes.release("b") == 0
    assert pushes.store.sets["policy"].status.run == "a"
    assert await pushes.release("a") == 1
    assert pushes.store.sets["policy"].status.version == 1
    assert (await pushes.push("policy", 2, Update(tmp_path / "2", SENT), "b")).run == "b"


async def test_a_release_waits_for_the_push_of_its_run(pushes, tmp_path):
    push = asyncio.create_task(pushes.push("policy", 1, Update(tmp_path / "1", SENT), "a"))
    await asyncio.sleep(0.01)
    assert await pushes.release("a") == 1
    assert (await push).run == "a"
    assert pushes.store.sets["policy"].status.run is None


async def test_a_restarted_service_knows_the_owner_of_the_kept_weights(pushes, tmp_path, monkeypatch):
    def started_again():
        again = Pushes(SimpleNamespace(sets={"policy": WeightSet("policy", {}, "float32")}), state, None, [])
        again.store.folder = SimpleNamespace(new_file=lambda: tmp_path / "new")
        again.take_up_kept()
        return again

    monkeypatch.setattr(
        "rollout_service.fleet.pushes.locate",
        lambda version, *_: WeightsFile(version, str(tmp_path / "new"), "", "", None),
    )
    state = StateFolder(tmp_path / "state")
    state.keep("policy", 7, tmp_path / "7", "a")
    again = started_again()
    assert (again.store.sets["policy"].status.version, again.store.sets["policy"].status.run) == (7, "a")
    with pytest.raises(RefusedUpdate, match="belongs to the run 'a'"):
        await again.push("policy", 8, Update(tmp_path / "1", SENT), "b")
    await again.release("a")
    assert started_again().store.sets["policy"].status.run is None
    state.close()


async def test_a_version_that_the_disk_has_no_room_for_is_not_published(pushes, tmp_path):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    del pushes._load_everywhere  # the left-out one
    pushes.state = SimpleNamespace(keep=no_room, folder=tmp_path)
    with pytest.raises(RefusedUpdate, match="No space left") as refused:
        await pushes.push("policy", 1, Update(tmp_path / "w", SENT))
    assert refused.value.status == 507
    assert pushes.store.sets["policy"].status.version == 0


async def test_a_version_whose_kept_copy_has_other_bytes_is_refused_and_forgotten(pushes, tmp_path):
    forgotten = []
    del pushes._load_everywhere
    pushes.state = SimpleNamespace(
        keep=lambda *_: "b" * 64, folder=tmp_path, forget_all_but=lambda *kept: forgotten.append(kept)
    )
    with pytest.raises(RefusedUpdate, match="push again"):
        await pushes.push("policy", 1, Update(tmp_path / "w", SENT))
    assert forgotten == [("policy", 0)]


def engine(pushes, index, outcome):
    """An engine in service, whose `load` ends with `outcome`."""

    async def load(weights, of_drafter):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    pushes.members.append(Member(index, SimpleNamespace(load=SimpleNamespace(remote=load)), in_service=True))


@pytest.fixture
def loading(pushes, monkeypatch):
    del pushes._load_everywhere
    pushes.killed, pushes.alarmed = [], []
    monkeypatch.setattr(
        "rollout_service.fleet.pushes.locate",
        lambda version, update, *_: WeightsFile(version, str(update.file), update.checksum, "here", None),
    )
    pushes.store.version, pushes.store.differs = lambda of: 1, lambda *_: True
    pushes.alarms = SimpleNamespace(
        after_push=lambda *_, **more: None, different_bytes=lambda *alarm: pushes.alarmed.append(alarm[3])
    )
    monkeypatch.setattr("ray.kill", lambda actor, no_restart: pushes.killed.append(actor))
    return pushes


async def test_bytes_that_no_engine_took_are_refused_and_every_engine_goes_on(loading, tmp_path):
    engine(loading, 0, DifferentBytes("read other bytes"))
    engine(loading, 1, DifferentBytes("read other bytes"))
    with pytest.raises(RefusedUpdate, match="read other bytes: push again"):
        await loading.push("policy", 1, Update(tmp_path / "w", SENT))
    assert loading.killed == []
    assert all(member.in_service for member in loading.members)
    assert loading.store.sets["policy"].status.version == 0


async def test_an_engine_that_alone_read_other_bytes_raises_an_alarm_and_restarts(loading, tmp_path):
    engine(loading, 0, Loaded(pause=0.1, changed=3, modules=3))
    engine(loading, 1, DifferentBytes("read other bytes"))
    assert (await loading.push("policy", 1, Update(tmp_path / "w", SENT))).version == 1
    assert loading.killed == [loading.members[1].actor]
    assert [member.in_service for member in loading.members] == [True, False]
    assert loading.alarmed == [1]


def relabelled_by(pushes, *outcomes):
    """Engines in service that take a label, or raise."""
    taken = []
    for index, outcome in enumerate(outcomes):

        async def relabel(version, outcome=outcome, index=index):
            if outcome is not None:
                raise outcome
            taken.append((index, version))

        actor = SimpleNamespace(relabel=SimpleNamespace(remote=relabel))
        pushes.members.append(Member(index, actor, in_service=True))
    return taken


async def in_service(pushes, file, version):
    """Put a version into service, then forget the engine that loaded it."""
    engine(pushes, 0, Loaded(pause=0.1, changed=3, modules=3))
    await pushes.push("policy", version, Update(file, SENT))
    pushes.members.clear()


async def test_a_higher_number_is_published_on_every_engine_in_the_state_folder_and_for_restarts(loading, tmp_path):
    loading.state = StateFolder(tmp_path / "state")
    loading.state.keep("policy", 3, tmp_path / "w", "a")
    (tmp_path / "w").write_bytes(b"tensors")
    published = []
    loading.on_published = lambda of, version: published.append(version)
    kept = loading.state.keep
    loading.state.keep = lambda *_: (kept(*_), SENT)[1]
    await in_service(loading, tmp_path / "w", 3)
    taken = relabelled_by(loading, None, None, TimeoutError())
    assert (await loading.relabel(9)).version == 9
    assert taken == [(0, 9), (1, 9)]
    assert [member.in_service for member in loading.members] == [True, True, False]
    assert loading.store.sets["policy"].file.version == 9
    assert {version: file.read_bytes() for version, file in loading.state.kept("policy").items()} == {9: b"tensors"}
    assert published == [3, 9]
    loading.state.close()


async def test_a_number_that_no_engine_takes_is_not_published(loading, tmp_path):
    await in_service(loading, tmp_path / "w", 3)
    relabelled_by(loading, TimeoutError())
    with pytest.raises(FleetError, match="no engine could take policy version 9"):
        await loading.relabel(9)
    assert loading.store.sets["policy"].version == loading.store.sets["policy"].file.version == 3


async def test_weights_of_a_run_are_not_relabelled(loading, tmp_path):
    engine(loading, 0, Loaded(pause=0.1, changed=3, modules=3))
    await loading.push("policy", 3, Update(tmp_path / "w", SENT), "a")
    for version in (9, 2):
        with pytest.raises(RefusedUpdate, match="belongs to the run 'a'"):
            await loading.relabel(version)


async def test_engines_without_memory_for_weights_are_not_given_any(loading, tmp_path):
    def asleep():
        raise RefusedUpdate("the engines sleep", [], status=409)

    engine(loading, 0, Loaded(pause=0.1, changed=3, modules=3))
    loading.check_awake = asleep
    with pytest.raises(RefusedUpdate, match="sleep"):
        await loading.push("policy", 1, Update(tmp_path / "w", SENT))
    assert loading.store.sets["policy"].version == 0


async def test_the_ages_of_drafters_are_known_only_for_the_newest(loading, tmp_path, monkeypatch):
    monkeypatch.setattr("rollout_service.fleet.pushes.DRAFTERS_KEPT", 2)
    engine(loading, 0, Loaded(pause=0.1, changed=3, modules=3))
    loading.store.sets["drafter"] = WeightSet("drafter", {}, "float32")
    for version in (1, 2, 3, 4):
        await loading.push("drafter", version, Update(tmp_path / str(version), SENT))
    assert loading.drafter_since == {3: 1, 4: 1}


async def test_a_failure_after_the_publication_does_not_fail_the_push(loading, tmp_path):
    """The version is in service, and an engine that restarts loads its file."""

    def fails(of, version):
        raise OverflowError("too large for SQLite")

    loading.on_published = fails
    engine(loading, 0, Loaded(pause=0.1, changed=3, modules=3))
    assert (await loading.push("policy", 1, Update(tmp_path / "w", SENT))).version == 1
    assert loading.store.sets["policy"].status.version == 1
    assert (tmp_path / "w").exists()


async def test_the_file_of_a_push_that_is_not_in_service_is_deleted(pushes, tmp_path):
    with pytest.raises(FleetError):
        await pushes.push("policy", 1, Update(tmp_path / "bad", SENT))
    with pytest.raises(RefusedUpdate):
        await pushes.push("policy", 0, Update(tmp_path / "w", SENT))
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "w").exists()


async def test_an_engine_whose_ranks_differ_raises_an_alarm_and_restarts(loading, tmp_path):
    engine(loading, 0, Loaded(pause=0.1, changed=3, modules=3))
    engine(loading, 1, HalfLoaded("read other bytes on 1 of 2 ranks"))
    await loading.push("policy", 1, Update(tmp_path / "w", SENT))
    assert loading.killed == [loading.members[1].actor]
    assert loading.alarmed == [1]


async def test_an_engine_is_not_left_in_service_if_only_some_of_its_ranks_loaded(loading, tmp_path):
    engine(loading, 0, HalfLoaded("read other bytes on 1 of 2 ranks"))
    with pytest.raises(FleetError, match="on 1 of 2 ranks"):
        await loading.push("policy", 1, Update(tmp_path / "w", SENT))
    assert loading.killed == [loading.members[0].actor]


async def test_an_actors_error_is_one_line_without_rays_traceback(loading, tmp_path):
    error = RayTaskError("load", "Traceback (most recent call last):\n ...", DifferentBytes("read other bytes"))
    engine(loading, 0, error.as_instanceof_cause())
    with pytest.raises(RefusedUpdate) as refused:
        await loading.push("policy", 1, Update(tmp_path / "w", SENT))
    assert str(refused.value) == "DifferentBytes: read other bytes: push again"
