"""The batch queue: what is accepted is handed out until it is acknowledged, never after it, and never too stale."""

import sqlite3
import time

import pytest

from rollout_service.batches import BatchQueue, Unavailable, UnknownLease
from rollout_service.protocol import Completion, Group, GroupRequest, LeaseRequest, PromptsRequest, Sampling, WeightSpan


@pytest.fixture(params=["file", "memory"])
def queue(request, tmp_path):
    queue = BatchQueue(tmp_path / "queue.sqlite" if request.param == "file" else None, capacity=8, disk_mib=64)
    yield queue
    queue.close()


def send(queue, *names, **fields):
    groups = [GroupRequest(id=name, prompt_token_ids=[1, 2]) for name in names]
    return queue.add(PromptsRequest(groups=groups, **fields), groups)


def finished(name, version=0, tokens=5):
    spans = [WeightSpan(version=version, start=0, end=1), WeightSpan(version=version + 1, start=1, end=tokens)]
    completion = Completion(
        index=0, text="a", token_ids=[1] * tokens, logprobs=[-1.0] * tokens, weight_versions=spans, finish_reason="stop"
    )
    return Group(id=name, prompt_token_ids=[1, 2], completions=[completion], sampling=Sampling(), engine=0)


def generate(queue, version=0, count=None):
    """What the background does with everything that waits."""
    done = []
    while count is None or len(done) < count:
        waiting = queue.next_waiting()
        if waiting is None:
            break
        queue.finish(waiting.arrival, finished(waiting.request.id, version), version)
        done.append(waiting.request.id)
    return done


def lease(queue, groups=8, version=0, **fields):
    return queue.lease(LeaseRequest(groups=groups, **fields), version)


def names(batch):
    return [group.id for group in batch.groups]


def test_a_group_that_is_sent_again_changes_nothing_wherever_it_is(queue):
    assert send(queue, "a", "b").accepted == 2
    assert send(queue, "a", "c").model_dump() == {"accepted": 1, "known": 1, "acknowledged": []}
    assert generate(queue) == ["a", "b", "c"]
    assert send(queue, "a").accepted == 0
    batch = lease(queue)
    queue.acknowledge(batch.lease, ["a"])
    assert send(queue, "a", "b").model_dump() == {"accepted": 0, "known": 2, "acknowledged": ["a"]}
    assert generate(queue) == []


def test_an_acknowledged_group_never_comes_again_and_a_returned_one_does(queue):
    send(queue, "a", "b", "c")
    generate(queue)
    batch = lease(queue)
    assert names(lease(queue)) == [], "what is leased is nobody else's"
    queue.acknowledge(batch.lease, ["a"])
    assert queue.release(batch.lease, ["a", "b"]).model_dump() == {"lease": batch.lease, "groups": ["b"], "lost": ["a"]}
    assert names(lease(queue)) == ["b"]
    queue.release(batch.lease, None)
    with pytest.raises(UnknownLease):
        queue.acknowledge(batch.lease, None)
    assert names(lease(queue)) == ["c"]


def test_a_lease_that_ends_returns_its_groups_and_one_that_is_extended_does_not(queue):
    send(queue, "a", "b")
    generate(queue)
    first, second = lease(queue, 1, seconds=0.01), lease(queue, 1, seconds=0.01)
    queue.extend(second.lease, 100.0)
    time.sleep(0.02)
    assert queue.expire_leases() == 1
    assert names(lease(queue)) == ["a"]
    with pytest.raises(UnknownLease):
        queue.acknowledge(first.lease, None)
    assert queue.acknowledge(second.lease, None).groups == ["b"]


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


def test_the_bound_a_prompt_came_with_holds_too_and_at_a_push_already(queue):
    send(queue, "tight", max_staleness=1)
    send(queue, "loose", max_staleness=3)
    generate(queue, version=1)
    queue.drop_stale(3)
    assert queue.status().dropped == 1
    assert generate(queue, version=3, count=1) == ["tight"]
    assert names(lease(queue, version=5)) == [], "whoever leases without a bound does not get it either"


def test_higher_priorities_come_first_and_equal_ones_in_the_order_of_arrival(queue):
    send(queue, "a", "b")
    send(queue, "urgent", priority=5)
    assert generate(queue) == ["urgent", "a", "b"]
    assert names(lease(queue)) == ["urgent", "a", "b"]


def test_a_group_that_is_cancelled_while_it_is_generated_no_longer_waits(queue):
    send(queue, "a", "b")
    arrival = queue.next_waiting().arrival
    queue.cancel("")
    assert (queue.status().waiting, queue.status().generating) == (0, 1)
    queue.give_back(arrival)
    assert (queue.status().waiting, queue.status().generating) == (0, 0)


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
    queue.acknowledge(lease(queue, 2).lease, None)
    assert send(queue, *"xyz").accepted == 3


def test_everything_is_there_after_a_kill(tmp_path):
    file = tmp_path / "queue.sqlite"
    queue = BatchQueue(file, capacity=9, disk_mib=64)
    send(queue, *"abcde")
    generate(queue, version=2, count=3)
    queue.next_waiting()  # it is being generated when the service dies
    batch = lease(queue, 2, version=2, seconds=60)
    queue.acknowledge(batch.lease, ["a"])
    queue.database.execute("UPDATE leases SET deadline = 0")  # it was over long ago when the service starts again
    again = BatchQueue(file, capacity=9, disk_mib=64)  # the first one is not closed: as after kill -9
    assert again.expire_leases() == 0, "nobody could extend the lease while the service was down"
    status = again.status()
    assert (status.waiting, status.finished, status.leased, status.acknowledged) == (2, 1, 1, 1)
    assert status.persistent
    assert again.acknowledge(batch.lease, None).groups == ["b"]
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
    queue.acknowledge(batch.lease, None)
    assert send(queue, "more").accepted == 1
    assert generate(queue) == ["more"]


def test_the_log_says_what_happened_to_each_group(queue):
    send(queue, "a")
    generate(queue, version=1)
    queue.release(lease(queue, version=1).lease, None)
    queue.acknowledge(lease(queue, version=1).lease, None)
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
