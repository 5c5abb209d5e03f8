"""The state folder and the shared-memory folder: one owner, no half-written file, and no file of a killed service."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_service.protocol import GroupRequest, PromptsRequest
from rollout_service.queue.batch_queue import BatchQueue
from rollout_service.transports import folder as folders
from rollout_service.weights.state_folder import StateFolder


def test_one_service_at_a_time_owns_the_state_folder(tmp_path):
    state = StateFolder(tmp_path / "state")
    with pytest.raises(ValueError, match="belongs to a service that is running"):
        StateFolder(tmp_path / "state")
    state.close()
    StateFolder(tmp_path / "state").close()


def test_a_kept_version_is_complete_and_earlier_ones_are_removed(tmp_path):
    state, file = StateFolder(tmp_path / "state"), tmp_path / "w"
    for version in (2, 10):
        file.write_bytes(bytes([version]) * 100)
        state.keep("policy", version, file)
    state.keep("drafter", 3, file)
    assert sorted(state.kept("policy")) == [2, 10]
    state.forget_all_but("policy", 10)
    assert state.kept("policy")[10].read_bytes() == b"\n" * 100
    assert (sorted(state.kept("policy")), sorted(state.kept("drafter"))) == ([10], [3])
    (state.weights / ".policy-11.safetensors").write_bytes(b"half")
    state.close()
    again = StateFolder(tmp_path / "state")
    assert sorted(again.kept("policy")) == [10]
    assert not list(again.weights.glob(".*"))


@pytest.mark.parametrize("run", ["a", "\r\n\x85\u2028é"])
def test_a_kept_version_has_its_run_and_a_forgotten_one_leaves_nothing(tmp_path, run):
    state, file = StateFolder(tmp_path / "state"), tmp_path / "w"
    file.write_bytes(b"w")
    state.keep("policy", 2, file, "earlier")
    state.keep("policy", 3, file, run)
    state.keep("policy", 4, file, run)
    state.keep("policy", 4, file)  # pushed again, without a run
    assert [state.owner("policy", version) for version in (2, 3, 4)] == ["earlier", run, None]
    state.forget_all_but("policy", 3)
    assert {kept.name for kept in state.weights.iterdir()} == {"policy-3.safetensors", "policy-3.json"}
    state.release("policy", 3)
    assert state.owner("policy", 3) is None


def test_the_backup_of_the_page_of_operations_has_all_that_a_running_service_wrote(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    state = StateFolder(tmp_path / "state")
    queue = BatchQueue(state.queue, capacity=9, disk_mib=1)
    group = GroupRequest(id="g", prompt_token_ids=[1])
    queue.add(PromptsRequest(groups=[group]), [group])
    (tmp_path / "w").write_bytes(b"w")
    state.keep("policy", 3, tmp_path / "w", "a")
    names["back_up"](state.folder, tmp_path / "copy")
    copy = StateFolder(tmp_path / "copy")
    assert (copy.kept("policy")[3].read_bytes(), copy.owner("policy", 3)) == (b"w", "a")
    assert BatchQueue(copy.queue, capacity=9, disk_mib=1).status().waiting == 1
    assert state.queue.with_name("queue.sqlite-wal").stat().st_size > 0


def test_a_killed_services_shared_memory_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARED_MEMORY", tmp_path)
    hold = (
        "import fcntl, pathlib, sys, time; folder = pathlib.Path(sys.argv[1]); folder.mkdir();"
        "file = (folder / 'owner').open('w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    folder = tmp_path / "rollout-service-a"
    process = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    folders.remove_orphans()
    assert folder.exists()
    process.kill()
    process.wait()
    folders.remove_orphans()
    assert not folder.exists()
