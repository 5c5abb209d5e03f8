"""BatchQueue: prompts in, finished groups out under leases. SQLite with a write-ahead log, in a file or in memory.

    waiting --(generated)--> finished --(lease)--> leased --(ack)--> acknowledged
     | ^----(too stale)---------'  ^---(nack, or the lease's end)---'
     '--(cannot be generated)--> failed --(lease)--> failed, under a lease --(ack)--> acknowledged

- Every change is one transaction, with its lines of the log: what is answered has been written (synchronous = FULL).
- A group's id is its client's. An id that is sent again with the same request changes nothing, and with another one is
  an error. The newest REMEMBERED acknowledged ids are known, without their tokens, and never handed out again; an older
  one that is sent again is a new group.
- A failed group is handed out with its reason, by any lease of its run, and never generated again.
- The staleness bound is checked in `lease`, whatever happened before. `drop_stale` only spares the work.
- What is being generated is known to this process alone: after a restart it waits again.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from rollout_service.protocol import (
    Batch,
    BatchesStatus,
    FailedGroup,
    Group,
    GroupRequest,
    LeaseRequest,
    LeaseStatus,
    PromptsRequest,
    PromptsStatus,
)
from rollout_service.queue.database import QueueDatabase, Unavailable
from rollout_service.queue.queue_status import queue_status, why_short
from rollout_service.queue.records import request_digest, stored_metadata, stored_request, stored_results, what_is_wrong

FILLED = 0.9
"""share of the quota from which on new prompts are refused: the rest is for finishing those that are in"""
FILLED_FOR_RESULTS = 0.97
"""share from which on finished groups stay in memory: the rest is for leases and acknowledgements, which make room"""
FAILED = "state = 'failed' AND lease IS NULL"


class UnknownLease(LookupError):
    """A lease that was never given, has been acknowledged or returned, or is over."""


class OtherRequest(ValueError):
    """Ids that are known with another request: `positions` of them in the prompts that were sent."""

    def __init__(self, positions: list[int]):
        super().__init__(f"groups {positions} have ids that are known with other requests")
        self.positions = positions


class Waiting(NamedTuple):
    """A group to generate. `arrival` is its key in the queue; `rounds` is how often its generation was given up because
    its engines had died."""

    arrival: int
    request: GroupRequest
    max_staleness: int | None
    rounds: int


class BatchQueue:
    """`capacity` groups that are not acknowledged; `disk_mib` of database. Times are seconds since the epoch."""

    def __init__(self, file: Path | None, capacity: int, disk_mib: int):
        self.capacity, self.persistent = capacity, file is not None
        self.tables = QueueDatabase(file, disk_mib)
        self.database = self.tables.connection
        self.generating: set[int] = set()
        self.on_failed: Callable[[str, str], None] = lambda name, reason: None
        """called with the id of a group that failed, and why"""
        with self.tables.transaction() as execute:
            # Nobody could extend a lease while the service was down.
            execute("UPDATE leases SET deadline = max(deadline, ? + seconds)", (time.time(),))

    def close(self) -> None:
        self.database.close()

    # --- prompts in ---

    def add(self, request: PromptsRequest, groups: Sequence[GroupRequest]) -> PromptsStatus:
        """`groups` are the request's, admitted. All are in the queue when this returns, or none: raises Unavailable,
        and OtherRequest for ids that are known with another request."""
        digests = [request_digest(group) for group in groups]
        known, acknowledged, other = set(), [], []
        for i, group in enumerate(groups):
            found, is_acknowledged = self._known(request.run, str(group.id))
            if found is None:
                continue
            known.add(group.id)
            acknowledged += [str(group.id)] if is_acknowledged else []
            if found[0] not in (None, digests[i]):  # an older version kept no digest
                other.append(i)
        if other:
            raise OtherRequest(other)
        new = [(group, digest) for group, digest in zip(groups, digests, strict=True) if group.id not in known]
        if new:
            self._make_sure_of_room(len(new))
            with self.tables.transaction() as execute:
                for group, digest in new:
                    arrival = execute(
                        "INSERT INTO groups (run, id, state, priority, max_staleness, digest) "
                        "VALUES (?, ?, 'waiting', ?, ?, ?) RETURNING arrival",
                        (request.run, group.id, request.priority, request.max_staleness, digest),
                    ).fetchone()[0]
                    execute("INSERT INTO requests VALUES (?, ?)", (arrival, group.model_dump_json(exclude_none=True)))
                self.tables.log("accepted", [(request.run, str(group.id)) for group, _ in new])
        return PromptsStatus(accepted=len(new), known=len(known), acknowledged=acknowledged)

    def _known(self, run: str, name: str) -> tuple[tuple[bytes | None] | None, bool]:
        """The digest of a group that was sent before, in a tuple, and whether it is acknowledged."""
        in_queue = self.database.execute("SELECT digest FROM groups WHERE run = ? AND id = ?", (run, name)).fetchone()
        if in_queue is not None:
            return in_queue, False
        return self.tables.remembered_digest(run, name), True

    def _make_sure_of_room(self, new: int) -> None:
        in_queue = self.tables.value("SELECT count(*) FROM groups")
        if in_queue + new > self.capacity:
            raise Unavailable(429, f"{in_queue} groups are in the queue, {new} more than {self.capacity} do not fit")
        if self.tables.filled() > FILLED:
            raise Unavailable(
                507, f"the queue's disk is {self.tables.filled():.0%} full: acknowledge groups, or raise queue.disk_mib"
            )

    def cancel(self, run: str) -> tuple[int, list[int]]:
        """Forget the run's groups that are not acknowledged: their number, and those that were being generated."""
        with self.tables.transaction() as execute:
            rows = execute("DELETE FROM groups WHERE run = ? RETURNING arrival, id", (run,)).fetchall()
            self.tables.forget([arrival for arrival, _ in rows], "requests", "results")
            execute("DELETE FROM leases WHERE id NOT IN (SELECT lease FROM groups WHERE lease IS NOT NULL)")
            self.tables.log("cancelled", [(run, name) for _, name in rows])
        return len(rows), [arrival for arrival, _ in rows if arrival in self.generating]

    # --- generation ---

    def next_waiting(self, suspects: bool = True) -> Waiting | None:
        """The first group to generate, now being generated: `finish`, `fail` or `give_back` it. Without `suspects` none
        whose engines have died before."""
        while (row := self._first_waiting(suspects)) is not None:
            arrival, max_staleness, rounds = row
            try:
                request = stored_request(self.tables.value("SELECT body FROM requests WHERE arrival = ?", arrival))
            except ValidationError as error:
                self.fail(arrival, f"the stored request cannot be read: {what_is_wrong(error)}")
                continue
            self.generating.add(arrival)
            return Waiting(arrival, request, max_staleness, rounds)
        return None

    def _first_waiting(self, suspects: bool) -> Any:
        rows = self.database.execute(
            "SELECT arrival, max_staleness, rounds FROM groups WHERE state = 'waiting' AND (? OR rounds = 0) "
            "ORDER BY priority DESC, arrival",
            (suspects,),
        )
        return next((row for row in rows if row[0] not in self.generating), None)

    def give_back(self, arrival: int) -> None:
        """It waits again: its generation was ended."""
        self.generating.discard(arrival)

    def finish(self, arrival: int, group: Group, version: int) -> None:
        """Keep a finished group; the policy in service is `version`. Raises Unavailable: then it is not kept."""
        versions = [span.version for completion in group.completions for span in completion.weight_versions]
        tokens = sum(len(completion.token_ids) for completion in group.completions)
        result = group.model_dump_json(exclude_none=True)
        if self.tables.filled() > FILLED_FOR_RESULTS:
            raise Unavailable(507, f"the queue's disk is {self.tables.filled():.0%} full")
        with self.tables.transaction() as execute:
            row = execute(
                "UPDATE groups SET state = 'finished', oldest = ?, tokens = ?, finished = ? "
                "WHERE arrival = ? AND state = 'waiting' RETURNING run, id",
                (min(versions, default=version), tokens, time.time(), arrival),
            ).fetchone()  # fmt: skip
            if row is not None:  # else its run was cancelled
                execute("INSERT INTO results VALUES (?, ?)", (arrival, result))
                self.tables.log("finished", [row], version=version)
        self.generating.discard(arrival)

    def fail(self, arrival: int, reason: str) -> None:
        """The group cannot be generated: it is handed out as failed, and not tried again."""
        with self.tables.transaction() as execute:
            name = self._fail(execute, arrival, reason)
        self.generating.discard(arrival)
        if name is not None:
            self.on_failed(name, reason)

    def _fail(self, execute: Any, arrival: int, reason: str) -> str | None:
        """Its id; None when its run was cancelled."""
        row = execute(
            "UPDATE groups SET state = 'failed', finished = ? WHERE arrival = ? RETURNING run, id",
            (time.time(), arrival),
        ).fetchone()
        if row is None:
            return None
        body = self.tables.value("SELECT body FROM requests WHERE arrival = ?", arrival)
        failed = FailedGroup(id=row[1], error=reason, metadata=stored_metadata(body))
        execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (arrival, failed.model_dump_json()))
        self.tables.forget([arrival], "requests")
        self.tables.log("failed", [row])
        return row[1]

    def engines_died(self, arrival: int) -> int:
        """Count a round of engines that died with the group; the number so far, also from before a restart. 0 when its
        run was cancelled."""
        with self.tables.transaction() as execute:
            row = execute("UPDATE groups SET rounds = rounds + 1 WHERE arrival = ? RETURNING rounds", (arrival,))
            return next(row, (0,))[0]

    def drop_stale(self, version: int) -> None:
        """Finished groups that can no longer be handed out wait again, as the policy in service is `version`."""
        with self.tables.transaction():
            self._drop("max_staleness IS NOT NULL AND oldest < ? - max_staleness", (version,), version)

    def _drop(self, condition: str, parameters: tuple[Any, ...], version: int) -> int:
        rows = self.database.execute(
            "UPDATE groups SET state = 'waiting', oldest = NULL, finished = NULL "
            f"WHERE state = 'finished' AND {condition} RETURNING arrival, run, id, tokens",
            parameters,
        ).fetchall()
        if rows:
            self.tables.count("dropped", len(rows))
            self.tables.count("wasted_tokens", sum(tokens for *_, tokens in rows))
            self.tables.forget([arrival for arrival, *_ in rows], "results")
            self.tables.log("dropped", [(run, name) for _, run, name, _ in rows], version=version)
        return len(rows)

    def count(self, *, dropped: int = 0, wasted_tokens: int = 0) -> None:
        """What was aborted in the engines before it was finished."""
        with self.tables.transaction():
            self.tables.count("dropped", dropped)
            self.tables.count("wasted_tokens", wasted_tokens)

    # --- batches out ---

    def available(self, request: LeaseRequest, version: int) -> int:
        """Finished groups fresh enough to be leased."""
        oldest = version - request.max_staleness if request.max_staleness is not None else 0
        return self.tables.value(
            "SELECT count(*) FROM groups WHERE state = 'finished' AND run = ? AND oldest >= ? "
            "AND (max_staleness IS NULL OR oldest >= ? - max_staleness)",
            request.run, oldest, version,
        )  # fmt: skip

    def should_wait(self, request: LeaseRequest, version: int) -> bool:
        """Whether the batch is not complete, and waiting may complete it.

        A failed group does not cut a batch short while others of its run are to come. It ends the wait when none is:
        then nobody could complete the batch but the client, who must learn of the failure first.
        """
        available = self.available(request, version)
        if available >= request.groups:
            return False
        if not self.tables.value(f"SELECT count(*) FROM groups WHERE run = ? AND {FAILED}", request.run):
            return True
        to_come = "SELECT count(*) FROM groups WHERE run = ? AND state IN ('waiting', 'finished')"
        return self.tables.value(to_come, request.run) > available

    def lease(self, request: LeaseRequest, version: int) -> Batch:
        """The oldest fresh groups of the run, at most as many as asked for, and all of its failed ones. `version` is
        the policy's that will be trained on them: the newest of that in service and the trainer's own. Groups too stale
        for it are dropped."""
        name, now = uuid.uuid4().hex, time.time()
        with self.tables.transaction() as execute:
            stale = 0
            if request.max_staleness is not None:
                stale = self._drop("run = ? AND oldest < ?", (request.run, version - request.max_staleness), version)
            stale += self._drop(
                "run = ? AND max_staleness IS NOT NULL AND oldest < ? - max_staleness", (request.run, version), version
            )
            stored = execute(
                "SELECT arrival, id, body FROM groups JOIN results USING (arrival) "
                "WHERE state = 'finished' AND run = ? ORDER BY priority DESC, arrival LIMIT ?",
                (request.run, request.groups),
            ).fetchall()
            groups, unreadable = stored_results(stored)
            for arrival, reason in unreadable.items():
                self._fail(execute, arrival, reason)
            failed = execute(
                f"SELECT arrival, id, body FROM groups JOIN results USING (arrival) WHERE run = ? AND {FAILED} "
                "ORDER BY arrival",
                (request.run,),
            ).fetchall()
            rows = [row for row in stored if row[0] in groups] + failed
            if rows:
                execute("INSERT INTO leases VALUES (?, ?, ?)", (name, request.seconds, now + request.seconds))
                self.database.executemany(
                    "UPDATE groups SET state = CASE state WHEN 'finished' THEN 'leased' ELSE state END, lease = ? "
                    "WHERE arrival = ?",
                    [(name, row[0]) for row in rows],
                )
                self.tables.log("leased", [(request.run, row[1]) for row in rows], name, version)
        for arrival, group, _ in stored:
            if arrival in unreadable:
                self.on_failed(group, unreadable[arrival])
        return Batch(
            lease=name if rows else None,
            groups=list(groups.values()),
            failed=[FailedGroup.model_validate_json(body, extra="ignore") for _, _, body in failed],
            version=version,
            short=None if len(groups) == request.groups else why_short(self.tables, request, len(groups), stale),
        )

    def acknowledge(self, lease: str, names: list[str] | None) -> LeaseStatus:
        """Remove the lease's groups, or those named, failed ones too. Raises UnknownLease."""
        with self.tables.transaction() as execute:
            ended, status = self._ended(lease, names)
            self.database.executemany("DELETE FROM groups WHERE arrival = ?", [(row[0],) for row in ended])
            self.tables.forget([arrival for arrival, *_ in ended], "requests", "results")
            self.tables.remember([(run, name, digest) for _, run, name, digest in ended])
            self._close(execute, lease, "acknowledged", ended)
        return status

    def release(self, lease: str, names: list[str] | None) -> LeaseStatus:
        """Hand them out again. Raises UnknownLease."""
        with self.tables.transaction() as execute:
            ended, status = self._ended(lease, names)
            self.database.executemany(
                "UPDATE groups SET state = CASE state WHEN 'leased' THEN 'finished' ELSE state END, lease = NULL "
                "WHERE arrival = ?",
                [(row[0],) for row in ended],
            )
            self._close(execute, lease, "returned", ended)
        return status

    def _ended(self, lease: str, names: list[str] | None) -> tuple[list[Any], LeaseStatus]:
        held = self.database.execute("SELECT arrival, run, id, digest FROM groups WHERE lease = ?", (lease,)).fetchall()
        if not held:
            raise UnknownLease(lease)
        asked = {row[2] for row in held} if names is None else set(names)
        ended = [row for row in held if row[2] in asked]
        groups = [row[2] for row in ended]
        return ended, LeaseStatus(lease=lease, groups=groups, lost=sorted(asked - set(groups)))

    def _close(self, execute: Any, lease: str, event: str, ended: list[Any]) -> None:
        self.tables.log(event, [(run, name) for _, run, name, _ in ended], lease)
        execute(
            "DELETE FROM leases WHERE id = ? AND id NOT IN (SELECT lease FROM groups WHERE lease = ?)", (lease, lease)
        )

    def release_run(self, run: str) -> int:
        """Hand out again all that the run has leased: its trainer begins anew. Gives the number of groups."""
        held = "SELECT DISTINCT lease FROM groups WHERE run = ? AND lease IS NOT NULL"
        leases = self.database.execute(held, (run,)).fetchall()
        return sum(len(self.release(lease, None).groups) for (lease,) in leases)

    def extend(self, lease: str, seconds: float) -> LeaseStatus:
        """The lease ends that many seconds from now. Raises UnknownLease."""
        with self.tables.transaction() as execute:
            execute("UPDATE leases SET seconds = ?, deadline = ? WHERE id = ?", (seconds, time.time() + seconds, lease))
            held = [name for (name,) in execute("SELECT id FROM groups WHERE lease = ?", (lease,))]
        if not held:
            raise UnknownLease(lease)
        return LeaseStatus(lease=lease, groups=held, lost=[])

    def expire_leases(self) -> int:
        """Return the groups of leases that are over; gives their number."""
        over = [name for (name,) in self.database.execute("SELECT id FROM leases WHERE deadline < ?", (time.time(),))]
        return sum(len(self.release(name, None).groups) for name in over)

    # --- how it is doing ---

    def status(self) -> BatchesStatus:
        return queue_status(self.tables, self.generating, self.capacity, self.persistent)

    def log(self) -> Iterator[dict[str, Any]]:
        """Every accepted, finished, failed, dropped, leased, returned, acknowledged and cancelled group, in order; the
        newest lines alone."""
        for row in self.database.execute("SELECT time, event, run, id, lease, version FROM log ORDER BY seq"):
            yield dict(zip(("time", "event", "run", "id", "lease", "version"), row, strict=True))
