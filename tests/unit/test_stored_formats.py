"""Stored formats: the next service reads all that a service left, or refuses it in one line before an engine starts.

tests/unit/stored/queue-1.sql is a queue of format 1 that has every stored field.
`python tests/unit/test_stored_formats.py` writes the file of the present FORMAT.
"""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from drafters.files.stored_format import OtherFormat
from rollout_service.config import ServiceConfig
from rollout_service.protocol import (
    Completion,
    FailedGroup,
    Group,
    GroupRequest,
    LeaseRequest,
    PromptsRequest,
    RoutedExperts,
    Sampling,
    Speculation,
    WeightSpan,
)
from rollout_service.queue import database
from rollout_service.queue.batch_queue import BatchQueue
from rollout_service.weights import state_folder
from rollout_service.weights.state_folder import StateFolder

KEPT = Path(__file__).parent / "stored" / f"queue-{database.FORMAT}.sql"
RAISE = (
    f"queues of format {database.FORMAT} that services left would be misread. Keep what is stored as it was, or raise "
    "FORMAT in rollout_service/queue/database.py and run `python tests/unit/test_stored_formats.py`"
)
ADD = "queues of before can be read, and the new field is not tested: run `python tests/unit/test_stored_formats.py`"
NEVER_STORED = {"prompt", "messages"}
"""fields of a group that admission replaces with token ids"""
DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "models" / "policy"


def request(name):
    sampling = Sampling(
        temperature=0.5, top_p=0.9, top_k=5, max_tokens=7, min_tokens=1, stop=["."], ignore_eos=True, seed=3
    )
    return GroupRequest(
        id=name, prompt_token_ids=[1, 2], n=2, sampling=sampling, session="s", draft_steps=True, routed_experts=True,
        metadata={"index": 1},
    )  # fmt: skip


def result(group):
    speculation = Speculation(
        drafter="mtp", drafter_version=1, draft_steps=1, drafted=2, accepted=1, accepted_histogram=[0, 1, 0],
        steps=[(2, 1)],
    )  # fmt: skip
    completion = Completion(
        index=0, text="ab", token_ids=[3, 4], logprobs=[-0.5, -1.5], finish_reason="stop", stop_reason=".",
        weight_versions=[WeightSpan(version=4, start=0, end=2)], speculation=speculation,
        routed_experts=RoutedExperts(shape=(3, 2, 1), dtype="uint8", data="AAECAwQF"),
    )  # fmt: skip
    return Group(
        id=group.id, prompt_token_ids=group.prompt_token_ids, completions=[completion], sampling=group.sampling,
        engine=0, metadata=group.metadata,
    )  # fmt: skip


def misread(bodies):
    """The first stored (type, text) that would not be read as it was written, and the reason."""
    for kind, body in bodies:
        try:
            read = kind.model_validate_json(body, extra="forbid")
        except ValidationError as error:
            return str(error)
        if json.loads(read.model_dump_json(exclude_unset=True)) != json.loads(body):
            return f"{body} is read as {read}"
    return None


def write_kept():
    """A queue with a group in every state."""
    if KEPT.exists() and (wrong := misread(stored(load(":memory:")))):
        sys.exit(f"{wrong}\n{RAISE}")
    queue = BatchQueue(None, capacity=9, disk_mib=1)
    for name in ("acknowledged", "leased", "finished", "failed", "waiting"):
        queue.add(PromptsRequest(groups=[request(name)], run="a", max_staleness=2), [request(name)])
        if name == "failed":
            queue.fail(queue.next_waiting().arrival, "too long")
        elif name != "waiting":
            queue.finish(queue.next_waiting().arrival, result(request(name)), 4)
        if name in ("acknowledged", "leased"):
            lease = queue.finished.lease(LeaseRequest(groups=1, run="a"), 4).lease
        if name == "acknowledged":
            queue.finished.acknowledge(lease, None)
    numbered = f"PRAGMA user_version = {database.FORMAT};"
    KEPT.write_text("\n".join([*queue.database.iterdump(), numbered]) + "\n", encoding="utf-8")


@pytest.fixture
def kept(tmp_path):
    """The kept file as a database."""
    file = tmp_path / "queue.sqlite"
    load(file).close()
    return file


def load(file):
    kept = sqlite3.connect(file)
    kept.executescript(KEPT.read_text(encoding="utf-8"))
    return kept


def change(file, *statements):
    with sqlite3.connect(file) as changed:
        for statement in statements:
            changed.execute(statement)
    changed.close()


def stored(kept):
    """Every wire type in the database, as (type, text)."""
    requests = kept.execute("SELECT body FROM requests").fetchall()
    results = kept.execute("SELECT state, body FROM groups JOIN results USING (arrival)").fetchall()
    return [(GroupRequest, body) for (body,) in requests] + [
        (FailedGroup if state == "failed" else Group, body) for state, body in results
    ]


def unset(value):
    """Fields of a model, and of the models in it, that were not set."""
    if isinstance(value, list):
        return set().union(*map(unset, value))
    if not isinstance(value, BaseModel):
        return set()
    fields = set(type(value).model_fields)
    inner = (unset(getattr(value, field)) for field in fields)
    return set().union({f"{type(value).__name__}.{field}" for field in fields - value.model_fields_set}, *inner)


def test_every_field_of_a_kept_queue_is_read_as_it_was_written():
    bodies = stored(load(":memory:"))
    assert {kind for kind, _ in bodies} == {GroupRequest, Group, FailedGroup}
    assert misread(bodies) is None, RAISE


def test_the_kept_queue_has_every_field_that_is_stored():
    missing = set().union(*(unset(kind.model_validate_json(body)) for kind, body in stored(load(":memory:"))))
    assert missing == {f"GroupRequest.{field}" for field in NEVER_STORED}, ADD


def test_a_kept_queue_is_used_again(kept):
    queue = BatchQueue(kept, capacity=9, disk_mib=1)
    states = ("waiting", "finished", "failed", "leased", "acknowledged")
    assert [getattr(queue.status(), state) for state in states] == [1] * 5
    groups = [request(state) for state in states]
    known = queue.add(PromptsRequest(groups=groups, run="a"), groups)
    assert (known.known, known.acknowledged) == (5, ["acknowledged"]), f"digests differ: {RAISE}"
    assert queue.next_waiting().request == request("waiting")
    batch = queue.finished.lease(LeaseRequest(groups=9, run="a"), 4)
    assert (batch.groups, [failed.error for failed in batch.failed]) == ([result(request("finished"))], ["too long"])
    queue.close()


@pytest.mark.parametrize("number", [0, database.FORMAT])
def test_a_queue_from_before_formats_had_numbers_is_read_and_numbered(kept, number):
    change(kept, f"PRAGMA user_version = {number}")
    queue = BatchQueue(kept, capacity=9, disk_mib=1)
    assert queue.status().waiting == 1
    assert queue.tables.value("PRAGMA user_version") == database.FORMAT
    queue.close()


@pytest.mark.parametrize(
    ("number", "statement", "found"),
    [
        (database.FORMAT + 1, "SELECT 1", f"format {database.FORMAT + 1}"),
        (0, "ALTER TABLE groups RENAME COLUMN oldest TO version", "format 0 with other columns"),
        (database.FORMAT, "ALTER TABLE requests ADD COLUMN more TEXT", f"format {database.FORMAT} with other columns"),
    ],
)
def test_a_queue_of_another_format_is_refused_in_a_line_and_left_as_it_is(kept, number, statement, found):
    change(kept, statement, f"PRAGMA user_version = {number}")
    before = kept.read_bytes()
    with pytest.raises(OtherFormat, match="move it away") as refused:
        BatchQueue(kept, capacity=9, disk_mib=1)
    assert str(refused.value).startswith(f"{kept} has {found}, and this version reads format {database.FORMAT}: ")
    assert "\n" not in str(refused.value)
    assert kept.read_bytes() == before


@pytest.fixture
def folder(tmp_path):
    """A state folder of format 1."""
    (tmp_path / "state" / "weights").mkdir(parents=True)
    for name, text in {
        "format": "1\n",
        "weights/policy-12.safetensors": "w",
        "weights/policy-12.json": '{"run": "a"}',
        "weights/drafter-3.safetensors": "d",
    }.items():
        (tmp_path / "state" / name).write_text(text)
    return tmp_path / "state"


@pytest.mark.parametrize("numbered", [True, False])
def test_a_kept_state_folder_is_read_and_numbered(folder, numbered):
    assert state_folder.FORMAT == 1, "the fixture has format 1"
    if not numbered:
        (folder / "format").unlink()
    state = StateFolder(folder)
    policy, drafter = folder / "weights" / "policy-12.safetensors", folder / "weights" / "drafter-3.safetensors"
    assert (state.kept("policy"), state.kept("drafter")) == ({12: policy}, {3: drafter})
    assert (state.owner("policy", 12), state.owner("drafter", 3)) == ("a", None)
    assert (folder / "format").read_text() == "1\n"
    assert state.queue == folder / "queue.sqlite"
    state.close()


def test_a_new_state_folder_has_what_the_kept_one_has(folder, tmp_path):
    state = StateFolder(tmp_path / "new")
    state.keep("policy", 12, folder / "weights" / "policy-12.safetensors", "a")
    state.keep("drafter", 3, folder / "weights" / "drafter-3.safetensors")
    state.close()
    for file in folder.rglob("*.*"):
        assert (tmp_path / "new" / file.relative_to(folder)).read_text() == file.read_text(), (
            "raise FORMAT in rollout_service/weights/state_folder.py, and change the fixture"
        )


@pytest.mark.parametrize(
    ("number", "name", "found"),
    [
        (2, "policy-12.json", "2"),
        (0, "policy-12.owner", "0 with weights/policy-12.owner"),
        (1, "target-12.json", "1 with weights/target-12.json"),
    ],
)
def test_a_state_folder_of_another_format_is_refused_in_a_line_and_left_as_it_is(folder, number, name, found):
    (folder / "format").write_text(f"{number}\n")
    (folder / "weights" / name).touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(OtherFormat, match="choose another folder") as refused:
        StateFolder(folder)
    assert str(refused.value).startswith(f"{folder} has format {found}, and this version reads format 1: ")
    assert sorted({*folder.rglob("*")} - {folder / "lock"}) == before


def test_a_service_refuses_another_format_before_an_engine_starts(tmp_path, capsys):
    from rollout_service.serve import launch

    StateFolder(tmp_path).close()
    change(tmp_path / "queue.sqlite", "PRAGMA user_version = 7")
    with pytest.raises(SystemExit) as ended:
        launch(ServiceConfig(model=str(DEMO), port=0, state=tmp_path, engine={"dtype": "float32"}))
    assert str(ended.value).startswith(f"rollout-service launch: {tmp_path}/queue.sqlite has format 7, and ")
    assert "Stopping the engines" not in capsys.readouterr().err


if __name__ == "__main__":
    write_kept()
