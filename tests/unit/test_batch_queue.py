"""The batch queue: a group is handed out until it is acknowledged, never afterwards, and never too stale."""

import sqlite3
import time

import pytest

from rollout_service.protocol import (
    MAX_VERSION,
    Completion,
    Group,
    GroupRequest,
    LeaseRequest,
    PromptsRequest,
    Sampling,
    WeightSpan,
)
from rollout_service.queue.batch_queue import BatchQueue, OtherRequest
from rollout_service.queue.database import Unavailable
from rollout_service.queue.finished_groups import UnknownLease
from rollout_service.queue.records import request_digest


@pytest.fixture(params=["file", "memory"])
def queue(request, tmp_path):
    queue = BatchQueue(tmp_path / "queue.sqlite" if request.param == "file" else None, capacity=8, disk_mib=64)
    yield queue
    queue.close()


def send(queue, *names, prompt=(1, 2), **fields):
    groups = [GroupRequest(id=name, prompt_token_ids=list(prompt), metadata={"name": name}) for name in names]
    return queue.add(PromptsRequest(groups=groups, **fields), groups)


def finished(name, version=0, tokens=5):
    spans = [WeightSpan(version=version, start=0, end=1), WeightSpan(version=version + 1, start=1, end=tokens)]
    completion = Completion(
        index=0, text="a", token_ids=[1] * tokens, logprobs=[-1.0] * tokens, weight_versions=spans, finish_reason="stop"
    )
    return Group(id=name, prompt_token_ids=[1, 2], completions=[completion], sampling=Sampling(), engine=0)


def generate(queue, version=0, count=None):
    """Does what background generation does with all waiting groups."""
    done = []
    while count is None or len(done) < count:
        waiting = queue.next_waiting()
        if waiting is None:
            break
        queue.finish(waiting.arrival, finished(waiting.request.id, version), version)
        done.append(waiting.request.id)
    return done


def lease(queue, groups=8, version=0, **fields):
    return queue.finished.lease(LeaseRequest(groups=groups, **fields), version)


def names(batch):
    return [group.id for group in batch.groups]


def test_a_group_that_is_sent_again_changes_nothing_in_any_state(queue):
    assert send(queue, "a", "b").accepted == 2
    assert send(queue, "a", "c").model_dump() == {"accepted": 1, "known": 1, "acknowledged": []}
    assert generate(queue) == ["a", "b", "c"]
    assert send(queue, "a").accepted == 0
    batch = lease(queue)
    queue.finished.acknowledge(batch.lease, ["a"])
    assert send(queue, "a", "b").model_dump() == {"accepted": 0, "known": 2, "acknowledged": ["a"]}
    assert generate(queue) == []


def test_an_acknowledged_group_never_comes_again_and_a_returned_one_does(queue):
    send(queue, "a", "b", "c")
    generate(queue)
    batch = lease(queue)
    assert names(lease(queue)) == [], "a leased group is not leased to anyone else"
    queue.finished.acknowledge(batch.lease, ["a"])
    assert queue.finished.release(batch.lease, ["a", "b"]).model_dump() == {
        "lease": batch.lease,
        "groups": ["b"],
        "lost": ["a"],
    }
    assert names(lease(queue)) == ["b"]
    queue.finished.release(batch.lease, None)
    with pytest.raises(UnknownLease):
        queue.finished.acknowledge(batch.lease, None)
    assert names(lease(queue)) == ["c"]


def test_an_expired_lease_returns_its_groups_and_an_extended_one_does_not(queue):
    send(queue, "a", "b")
    generate(queue)
    first, second = lease(queue, 1, seconds=0.01), lease(queue, 1, seconds=0.01)
    queue.finished.extend(second.lease, 100.0)
    time.sleep(0.02)
    assert queue.finished.expire_leases() == 1
    assert names(lease(queue)) == ["a"]
    with pytest.raises(UnknownLease):
        queue.finished.acknowledge(first.lease, None)
    assert queue.finished.acknowledge(second.lease, None).groups == ["b"]


def test_the_bound_holds_where_the_batch_is_handed_out_and_stale_groups_are_generated_again(queue):
    send(queue, "old", "new")
    generate(queue, version=1, count=1)
    generate(queue, version=3)
    batch = lease(queue, version=4, max_staleness=2)
    assert names(batch) == ["new"]
    assert "1 of 8" in batch.short
    assert "1 were older than 2 versions" in batch.short
    status = queue.status()
    assert (status.dropped, status.tokens_wasted, status.waiting) == (1, 5, 1)
    assert generate(queue, version=4) == ["old"]
    assert names(lease(queue, version=4, max_staleness=0)) == ["old"]


def test_the_bound_of_a_prompt_holds_too_and_already_at_a_push(queue):
    send(queue, "tight", max_staleness=1)
    send(queue, "loose", max_staleness=3)
    generate(queue, version=1)
    queue.finished.drop_stale(3)
    assert queue.status().dropped == 1
    assert generate(queue, version=3, count=1) == ["tight"]
    assert names(lease(queue, version=5)) == [], "a lease without a bound does not get it either"


def test_higher_priorities_come_first_and_equal_ones_in_the_order_of_arrival(queue):
    send(queue, "a", "b")
    send(queue, "urgent", priority=5)
    assert generate(queue) == ["urgent", "a", "b"]
    assert names(lease(queue)) == ["urgent", "a", "b"]


def test_a_group_that_is_cancelled_while_it_is_generated_no_longer_waits(queue):
    send(queue, "a", "b")
    arrival = queue.next_waiting().arrival
    assert queue.cancel("") == [arrival, arrival + 1]
    status = queue.status(generating={arrival})
    assert (status.waiting, status.generating) == (0, 1)


def test_runs_do_not_see_each_others_groups(queue):
    send(queue, "a", run="one")
    send(queue, "a", run="two")
    generate(queue)
    assert names(lease(queue, run="one")) == ["a"]
    assert names(lease(queue, run="none")) == []
    queue.cancel("two")
    assert names(lease(queue, run="two")) == []
    assert queue.status().leased == 1


def test_a_full_queue_says_so_and_takes_none_of_the_request(queue):
    send(queue, *"abcdef")
    with pytest.raises(Unavailable) as full:
        send(queue, *"xyz")
    assert full.value.status == 429
    assert queue.status().waiting == 6
    generate(queue)
    queue.finished.acknowledge(lease(queue, 2).lease, None)
    assert send(queue, *"xyz").accepted == 3


def test_a_killed_queue_loses_nothing(tmp_path):
    file = tmp_path / "queue.sqlite"
    queue = BatchQueue(file, capacity=9, disk_mib=64)
    send(queue, *"abcde")
    generate(queue, version=2, count=3)
    queue.next_waiting()  # it is being generated when the service dies
    batch = lease(queue, 2, version=2, seconds=60)
    queue.finished.acknowledge(batch.lease, ["a"])
    queue.database.execute("UPDATE leases SET deadline = 0")  # the lease ended long before the service starts again
    again = BatchQueue(file, capacity=9, disk_mib=64)  # the first queue is not closed, as after kill -9
    assert again.finished.expire_leases() == 0, "nobody could extend the lease while the service was down"
    status = again.status()
    assert (status.waiting, status.finished, status.leased, status.acknowledged) == (2, 1, 1, 1)
    assert status.persistent
    assert again.finished.acknowledge(batch.lease, None).groups == ["b"]
    assert generate(again, version=2) == ["d", "e"]
    taken = lease(again, version=2)
    assert names(taken) == ["c", "d", "e"]
    assert taken.groups[0] == finished("c", version=2)


def test_a_full_disk_refuses_prompts_loses_nothing_and_goes_on_when_there_is_room(tmp_path):
    queue = BatchQueue(tmp_path / "queue.sqlite", capacity=10_000, disk_mib=1)
    sent = []

    def fill():
        for i in range(1000):
            send(queue, f"{i}", max_staleness=9)
            sent.append(f"{i}")
            waiting = queue.next_waiting()
            queue.finish(waiting.arrival, finished(f"{i}", tokens=300), 0)

    with pytest.raises(Unavailable) as full:
        fill()
    assert full.value.status == 507
    batch = lease(queue, 4096)
    assert names(batch) == sent
    queue.finished.acknowledge(batch.lease, None)
    assert send(queue, "more").accepted == 1
    assert generate(queue) == ["more"]


def test_the_log_says_what_happened_to_each_group(queue):
    send(queue, "a")
    generate(queue, version=1)
    queue.finished.release(lease(queue, version=1).lease, None)
    queue.finished.acknowledge(lease(queue, version=1).lease, None)
    events = [line["event"] for line in queue.log()]
    assert events == ["accepted", "finished", "leased", "returned", "leased", "acknowledged"]


def test_a_failed_write_leaves_the_queue_as_it_was(queue):
    send(queue, "a")
    waiting = queue.next_waiting()
    queue.database.execute("PRAGMA query_only = ON")
    with pytest.raises(Unavailable) as failed:
        queue.finish(waiting.arrival, finished("a"), 0)
    assert failed.value.status == 507
    assert isinstance(failed.value.__cause__, sqlite3.OperationalError)
    queue.database.execute("PRAGMA query_only = OFF")
    queue.finish(waiting.arrival, finished("a"), 0)
    assert names(lease(queue)) == ["a"]


def fail(queue, reason="ValueError: too long"):
    arrival = queue.next_waiting().arrival
    queue.fail(arrival, reason)


def failures(batch):
    return {group.id: group.error for group in batch.failed}


def test_a_failed_group_is_handed_out_with_its_reason_once_and_never_generated_again(queue):
    send(queue, "bad", "good")
    fail(queue)
    assert generate(queue) == ["good"]
    assert (queue.status().failed, queue.status().waiting) == (1, 0)
    batch = lease(queue)
    assert (names(batch), failures(batch)) == (["good"], {"bad": "ValueError: too long"})
    assert batch.failed[0].metadata == {"name": "bad"}
    assert "1 failed" in batch.short
    assert (queue.status().failed, queue.status().leased) == (0, 2)
    assert lease(queue).lease is None
    assert queue.finished.acknowledge(batch.lease, ["bad"]).groups == ["bad"]
    assert send(queue, "bad").acknowledged == ["bad"]
    assert queue.finished.release(batch.lease, None).groups == ["good"]
    assert generate(queue) == []


def test_a_lease_of_only_failed_groups_ends_as_any_other(queue):
    send(queue, "bad")
    fail(queue)
    batch = lease(queue, seconds=0.01)
    assert (batch.groups, failures(batch).keys()) == ([], {"bad"})
    time.sleep(0.02)
    assert queue.finished.expire_leases() == 1
    again = lease(queue)
    assert failures(again).keys() == {"bad"}
    assert queue.finished.extend(again.lease, 10.0).groups == ["bad"]
    assert queue.finished.release(again.lease, None).groups == ["bad"]
    assert failures(lease(queue)).keys() == {"bad"}
    assert queue.finished.release_run("") == 1
    assert len(queue.cancel("")) == 1
    assert lease(queue).lease is None


def test_failed_groups_belong_to_their_run_and_survive_a_kill(tmp_path):
    queue = BatchQueue(tmp_path / "queue.sqlite", capacity=9, disk_mib=64)
    send(queue, "bad", run="one")
    fail(queue)
    again = BatchQueue(tmp_path / "queue.sqlite", capacity=9, disk_mib=64)
    assert again.next_waiting() is None
    assert lease(again, run="two").lease is None
    assert failures(lease(again, run="one")).keys() == {"bad"}


def test_a_failure_ends_the_wait_for_a_batch_when_no_group_of_its_run_is_left(queue):
    send(queue, "bad", "a", "b")
    send(queue, "c", run="another")
    wanted = LeaseRequest(groups=3)
    fail(queue)
    assert queue.finished.should_wait(wanted, 0)
    generate(queue, count=1)
    assert queue.finished.should_wait(wanted, 0), "the lease waits while the batch can still grow"
    generate(queue, count=1)
    assert not queue.finished.should_wait(wanted, 0)
    assert queue.finished.should_wait(LeaseRequest(groups=1, run="another"), 0)
    lease(queue)
    assert queue.finished.should_wait(wanted, 0), "the failure is reported, since more prompts may come"


def test_rounds_of_dead_engines_are_counted_through_a_restart_and_suspects_can_be_left_waiting(tmp_path):
    queue = BatchQueue(tmp_path / "queue.sqlite", capacity=9, disk_mib=64)
    send(queue, "deadly", "other")
    arrival = queue.next_waiting().arrival
    assert queue.engines_died(arrival) == 1
    again = BatchQueue(tmp_path / "queue.sqlite", capacity=9, disk_mib=64)
    other = again.next_waiting(suspects=False)
    assert other.request.id == "other"
    assert again.next_waiting({other.arrival}, suspects=False) is None
    assert again.next_waiting({other.arrival}).rounds == 1
    assert again.engines_died(arrival) == 2
    again.cancel("")
    assert again.engines_died(arrival) == 0


def test_an_id_that_comes_again_with_another_prompt_is_an_error_wherever_its_group_is(queue):
    send(queue, "a", "b")

    def refused():
        with pytest.raises(OtherRequest) as other:
            send(queue, "new", "a", prompt=(1, 3))
        assert other.value.positions == [1]
        assert send(queue, "a").known == 1

    refused()
    generate(queue)
    refused()
    batch = lease(queue)
    refused()
    queue.finished.acknowledge(batch.lease, None)
    refused()
    assert queue.next_waiting() is None, "the queue takes no part of a refused request"
    assert send(queue, "a", run="another", prompt=(1, 3)).accepted == 1


def test_requests_that_ask_for_the_same_have_the_same_digest():
    group = GroupRequest(id="a", prompt_token_ids=[1], metadata={"x": 1, "y": 2})
    assert request_digest(group) == request_digest(GroupRequest(
        id="a", prompt_token_ids=[1], n=1, sampling=Sampling(temperature=1.0), metadata={"y": 2, "x": 1}
    ))  # fmt: skip
    changes = ({"n": 2}, {"prompt_token_ids": [2]}, {"sampling": Sampling(seed=1)}, {"metadata": {"x": 2, "y": 2}})
    assert len({request_digest(group.model_copy(update=change)) for change in ({}, *changes)}) == 5


def test_the_largest_numbers_that_the_interface_takes_overflow_nothing(queue):
    send(queue, "a", priority=2**31 - 1, max_staleness=MAX_VERSION)
    send(queue, "b", priority=-(2**31), max_staleness=MAX_VERSION)
    for arrival in (1, 2):
        queue.finish(arrival, finished("a" if arrival == 1 else "b", version=MAX_VERSION - 1), MAX_VERSION)
    queue.finished.drop_stale(MAX_VERSION)
    queue.finished.drop_stale(0)
    queue.count(dropped=MAX_VERSION, wasted_tokens=MAX_VERSION)
    request = LeaseRequest(groups=4096, max_staleness=MAX_VERSION, version=MAX_VERSION, wait=600.0, seconds=86400.0)
    for version in (0, MAX_VERSION):
        assert queue.finished.available(request, version) == 2
    batch = queue.finished.lease(request, MAX_VERSION)
    assert names(batch) == ["a", "b"]
    queue.finished.extend(batch.lease, 86400.0)
    queue.finished.release(batch.lease, None)
    assert names(lease(queue, version=MAX_VERSION, max_staleness=0)) == []
    status = queue.status()
    assert status.dropped == MAX_VERSION + 2
    assert status.tokens_wasted == MAX_VERSION + 10


def test_a_request_that_another_version_stored_is_read_or_fails_and_blocks_nothing(queue):
    failed = []
    queue.failed.on_failed = lambda name, reason: failed.append((name, reason))
    send(queue, "bad", "newer", "good")
    change = "UPDATE requests SET body = ? WHERE arrival = ?"
    queue.database.execute(change, ('{"id": "bad", "prompt_token_ids": "1, 2", "metadata": {}}', 1))
    queue.database.execute(change, ('{"id": "newer", "prompt_token_ids": [1], "sampling": {"new": 1}, "new": 2}', 2))
    assert generate(queue) == ["newer", "good"]
    ((name, reason),) = failed
    assert name == "bad"
    assert reason == "the stored request cannot be read: prompt_token_ids: Input should be a valid array"
    assert failures(lease(queue)) == {"bad": reason}


def test_a_result_that_another_version_stored_is_read_or_fails_and_blocks_nothing(queue):
    failed = []
    queue.failed.on_failed = lambda name, reason: failed.append(name)
    send(queue, "bad", "newer", "good")
    generate(queue)
    queue.database.execute("UPDATE results SET body = '{}' WHERE arrival = 1")
    queue.database.execute("UPDATE results SET body = json_set(body, '$.new', 1) WHERE arrival = 2")
    batch = lease(queue)
    assert names(batch) == ["newer", "good"]
    assert failures(batch) == {"bad": "the stored result cannot be read: id: Field required"}
    assert failed == ["bad"]


def test_the_file_of_an_older_version_is_upgraded(tmp_path):
    file = tmp_path / "queue.sqlite"
    older = sqlite3.connect(file)
    older.executescript("""
        CREATE TABLE groups (
          arrival INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL,
          priority INTEGER NOT NULL, max_staleness INTEGER, oldest INTEGER, tokens INTEGER, finished REAL, lease TEXT,
          UNIQUE (run, id));
        CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
        INSERT INTO counts VALUES ('dropped', 3), ('wasted_tokens', 4);
        CREATE TABLE requests (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
        INSERT INTO groups (run, id, state, priority) VALUES ('', 'done', 'acknowledged', 0), ('', 'a', 'waiting', 0);
        INSERT INTO requests VALUES (2, '{"id": "a", "prompt_token_ids": [1, 2]}');
    """)
    older.close()
    for _ in range(2):
        queue = BatchQueue(file, capacity=9, disk_mib=64)
        assert (queue.status().acknowledged, queue.status().waiting, queue.status().dropped) == (1, 1, 3)
        assert send(queue, "done", "a").model_dump() == {"accepted": 0, "known": 2, "acknowledged": ["done"]}
        queue.close()
    assert generate(BatchQueue(file, capacity=9, disk_mib=64)) == ["a"]


def test_what_is_remembered_is_bounded_and_the_newest_ids_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr("rollout_service.queue.database.LOG_ROWS", 50)
    monkeypatch.setattr("rollout_service.queue.database.REMEMBERED", 20)
    queue = BatchQueue(None, capacity=8, disk_mib=64)
    for i in range(40):
        send(queue, f"{i}")
        generate(queue)
        queue.finished.acknowledge(lease(queue).lease, None)
    assert [line["id"] for line in queue.log()][-4:] == ["39"] * 4
    assert len(list(queue.log())) == 50
    assert send(queue, *(f"{i}" for i in range(20, 40))).known == 20
    assert send(queue, "19").accepted == 1, "a forgotten id counts as a new group"
    assert queue.status().acknowledged == 40, "all are counted"


def test_remembered_ids_never_fill_a_small_disk():
    queue = BatchQueue(None, capacity=1000, disk_mib=1)
    for first in range(0, 40_000, 1000):
        group = [(f"run-{first:028d}", f"group-{first + i:026d}") for i in range(1000)]
        with queue.tables.transaction():
            for event in ("accepted", "finished", "leased", "acknowledged"):
                queue.tables.log(event, group, lease="f" * 32, version=first)
            queue.tables.remember([(*names, b"d" * 16) for names in group])
    assert queue.tables.filled() < 0.5
    assert send(queue, "a").accepted == 1
