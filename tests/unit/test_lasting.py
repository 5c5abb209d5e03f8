"""Data that must survive a power loss: content is synced before its name, and a name before anything relies on it."""

import os
from pathlib import Path

import pytest
import rl_toys as toys
from test_rl_asynchronous import config, loop, pool, service  # noqa: F401  (fixtures)

from drafters.files.durable import make_folders, rename_lasting, replacing
from rl_loop.learner.local_learner import LocalLearner
from rollout_service.weights.state_folder import StateFolder


@pytest.fixture
def events(monkeypatch):
    """Every sync and rename in order, as (what, path)."""
    events: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor):
        fsync(descriptor)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def renamed(path, target):
        events.append(("rename", Path(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    return events


def before(events, event):
    return events[: events.index(event)]


def test_a_folder_is_synced_with_all_in_it_then_renamed_then_its_name_is_synced(events, tmp_path):
    partial, final = tmp_path / ".a", tmp_path / "a"
    (partial / "b").mkdir(parents=True)
    (partial / "b" / "c").write_text("c")
    rename_lasting(partial, final)
    renamed = ("rename", final)
    assert {path for _, path in before(events, renamed)} == {partial, partial / "b", partial / "b" / "c"}
    assert events[-2:] == [renamed, ("sync", tmp_path)]
    assert (final / "b" / "c").read_text() == "c"


def test_the_names_of_new_folders_are_synced(events, tmp_path):
    make_folders(tmp_path / "a" / "b")
    assert set(events) == {("sync", tmp_path), ("sync", tmp_path / "a")}
    make_folders(tmp_path / "a" / "b")
    assert len(events) == 2


def test_a_file_is_replaced_whole_or_not_at_all(events, tmp_path):
    file = tmp_path / "a"
    file.write_text("old")

    def failing():
        with replacing(file) as partial:
            partial.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with replacing(file) as partial:
        partial.write_text("new")
    assert file.read_text() == "new"
    assert events == [("sync", tmp_path / ".a"), ("rename", file), ("sync", tmp_path)]


def test_groups_are_acknowledged_after_their_checkpoint_is_on_disk(events, service, pool, tmp_path):  # noqa: F811
    settings = config(tmp_path / "run", steps=1, prompts_per_step=2, completions=2, checkpoint_every=1)
    running = loop(settings, service, pool)
    acknowledge = service.acknowledge
    service.acknowledge = lambda *asked: (events.append(("acknowledge", tmp_path)), acknowledge(*asked))[1]
    running.run()
    folder = settings.output / "checkpoints" / "step-000001"
    acknowledged, renamed = events.index(("acknowledge", tmp_path)), events.index(("rename", folder))
    assert renamed < events.index(("sync", folder.parent), renamed) < acknowledged
    synced = {path for what, path in events[:renamed] if what == "sync"}
    hidden = folder.with_name(".step-000001")
    assert {hidden / file.relative_to(folder) for file in folder.rglob("*")} <= synced
    assert {settings.output / name for name in ("metrics.jsonl", "groups.jsonl")} <= synced
    assert settings.output in synced, "its parent holds the name of the checkpoints folder"
    assert tmp_path in synced, "and this folder holds the name of the output folder"


def test_a_checkpoint_of_the_synchronous_loop_is_synced(events, tmp_path):
    settings = toys.config(tmp_path, steps=1)
    toys.loop(settings, LocalLearner(settings, toys.llama()), toys.SamplingSource(toys.llama())).run()
    folder = tmp_path / "checkpoints" / "step-000001"
    synced = {path for what, path in before(events, ("rename", folder)) if what == "sync"}
    assert folder.with_name(".step-000001") / "model.safetensors" in synced
    assert events[-1] == ("sync", folder.parent)


def test_a_kept_version_is_synced(events, tmp_path):
    state, pushed = StateFolder(tmp_path / "state"), tmp_path / "pushed"
    pushed.write_bytes(b"w")
    events.clear()
    state.keep("policy", 3, pushed)
    kept = state.weights / "policy-3.safetensors"
    assert events == [("sync", kept.with_name(f".{kept.name}")), ("rename", kept), ("sync", state.weights)]
    state.close()
