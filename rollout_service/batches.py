"""BatchQueue: prompts in, finished groups out under leases. SQLite with a write-ahead log, in a file or in memory.

    waiting --(generated)--> finished --(lease)--> leased --(ack)--> acknowledged
       ^----(too stale)---------'  ^---(nack, or the lease's end)---'

- Every change is one transaction, with its lines of the log: what is answered has been written (synchronous = FULL).
- A group's id is its client's. An id that is sent again changes nothing; an acknowledged one is remembered, without its
  tokens, and never handed out again.
- The staleness bound is checked in `lease`, whatever happened before. `drop_stale` only spares the work.
- What is being generated is known to this process alone: after a restart it waits again.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rollout_service.protocol import (
    Batch,
    BatchesStatus,
    Group,
    GroupRequest,
    LeaseInfo,
    LeaseRequest,
    LeaseStatus,
    PromptsRequest,
    PromptsStatus,
)
from rollout_service.queue_database import QueueDatabase, Unavailable

FILLED = 0.9
"""share of the quota from which on new prompts are refused: the rest is for finishing those that are in"""
FILLED_FOR_RESULTS = 0.97
"""share from which on finished groups stay in memory: the rest is for leases and acknowledgements, which make room"""
RETRY_AFTER = 5
"""seconds after which a client that was refused for lack of room should try again"""


class UnknownLease(LookupError):
    """A lease that was never given, has been acknowledged or returned, or is over."""


class Waiting(NamedTuple):
    """A group to generate. `arrival` is its key in the queue."""

    arrival: int
    request: GroupRequest
    max_staleness: int | None


class BatchQueue:
    """`capacity` groups that are not acknowledged; `disk_mib` of database. Times are seconds since the epoch."""

    def __init__(self, file: Path | None, capacity: int, disk_mib: int):
        self.capacity, self.persistent = capacity, file is not None
        self.tables = QueueDatabase(file, disk_mib)
        self.database = self.tables.connection
        self.generating: set[int] = set()
        with self.tables.transaction() as execute:
            # Nobody could extend a lease while the service was down.
            execute("UPDATE leases SET deadline = max(deadline, ? + seconds)", (time.time(),))

    def close(self) -> None:
        self.database.close()

    # --- prompts in ---

    def add(self, request: PromptsRequest, groups: Sequence[GroupRequest]) -> PromptsStatus:
        """`groups` are the request's, admitted. All are in the queue when this returns, or none: raises Unavailable."""
        known = {
            group.id: row[0]
            for group in groups
            if (row := self.database.execute(
                "SELECT state FROM groups WHERE run = ? AND id = ?", (request.run, group.id)).fetchone())
        }  # fmt: skip
        new = [group for group in groups if group.id not in known]
        if new:
            in_queue = self.tables.value("SELECT count(*) FROM groups WHERE state != 'acknowledged'")
            if in_queue + len(new) > self.capacity:
                raise Unavailable(
                    429, f"{in_queue} groups are in the queue, {len(new)} more than {self.capacity} do not fit"
                )
            if self.tables.filled() > FILLED:
                raise Unavailable(
                    507,
                    f"the queue's disk is {self.tables.filled():.0%} full: acknowledge groups, or raise queue.disk_mib",
                )
            with self.tables.transaction() as execute:
                for group in new:
                    arrival = execute(
                        "INSERT INTO groups (run, id, state, priority, max_staleness) VALUES (?, ?, 'waiting', ?, ?) "
                        "RETURNING arrival",
                        (request.run, group.id, request.priority, request.max_staleness),
                    ).fetchone()[0]
                    execute("INSERT INTO requests VALUES (?, ?)", (arrival, group.model_dump_json(exclude_none=True)))
                self.tables.log("accepted", [(request.run, str(group.id)) for group in new])
        acknowledged = [str(name) for name, state in known.items() if state == "acknowledged"]
        return PromptsStatus(accepted=len(new), known=len(known), acknowledged=acknowledged)

    def cancel(self, run: str) -> list[int]:
        """Forget the run's groups that are not acknowledged. Returns those being generated."""
        with self.tables.transaction() as execute:
            rows = execute(
                "SELECT arrival, id FROM groups WHERE run = ? AND state != 'acknowledged'", (run,)
            ).fetchall()
            execute("DELETE FROM groups WHERE run = ? AND state != 'acknowledged'", (run,))
            self.tables.forget([arrival for arrival, _ in rows], "requests", "results")
            execute("DELETE FROM leases WHERE id NOT IN (SELECT lease FROM groups WHERE lease IS NOT NULL)")
            self.tables.log("cancelled", [(run, name) for _, name in rows])
        return [arrival for arrival, _ in rows if arrival in self.generating]

    # --- generation ---

    def next_waiting(self) -> Waiting | None:
        """The first group to generate, now being generated: `finish` or `give_back` it."""
        rows = self.database.execute(
            "SELECT arrival, max_staleness FROM groups WHERE state = 'waiting' ORDER BY priority DESC, arrival LIMIT ?",
            (len(self.generating) + 1,),
        )
        for arrival, max_staleness in rows.fetchall():
            if arrival not in self.generating:
                self.generating.add(arrival)
                body = self.tables.value("SELECT body FROM requests WHERE arrival = ?", arrival)
                return Waiting(arrival, GroupRequest.model_validate_json(body), max_staleness)
        return None

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

    def lease(self, request: LeaseRequest, version: int) -> Batch:
        """The oldest fresh groups of the run, at most as many as asked for. `version` is the policy's that will be
        trained on them: the newest of that in service and the trainer's own. Those too stale for it are dropped."""
        name, now = uuid.uuid4().hex, time.time()
        with self.tables.transaction() as execute:
            stale = 0
            if request.max_staleness is not None:
                stale = self._drop("run = ? AND oldest < ?", (request.run, version - request.max_staleness), version)
            stale += self._drop(
                "run = ? AND max_staleness IS NOT NULL AND oldest < ? - max_staleness", (request.run, version), version
            )
            rows = execute(
                "SELECT arrival, id, body FROM groups JOIN results USING (arrival) "
                "WHERE state = 'finished' AND run = ? ORDER BY priority DESC, arrival LIMIT ?",
                (request.run, request.groups),
            ).fetchall()
            if rows:
                execute("INSERT INTO leases VALUES (?, ?, ?)", (name, request.seconds, now + request.seconds))
                self.database.executemany(
                    "UPDATE groups SET state = 'leased', lease = ? WHERE arrival = ?", [(name, row[0]) for row in rows]
                )
                self.tables.log("leased", [(request.run, row[1]) for row in rows], name, version)
        return Batch(
            lease=name if rows else None,
            groups=[Group.model_validate_json(result) for _, _, result in rows],
            version=version,
            short=None if len(rows) == request.groups else self._why_short(request, len(rows), stale),
        )

    def _why_short(self, request: LeaseRequest, given: int, stale: int) -> str:
        states = dict(
            self.database.execute("SELECT state, count(*) FROM groups WHERE run = ? GROUP BY state", (request.run,))
        )
        waiting = states.get("waiting", 0)
        parts = [f"{given} of {request.groups} groups", f"{waiting} are waiting or being generated"]
        parts += [f"{states['leased'] - given} are under other leases"] if states.get("leased", 0) > given else []
        parts += [f"{stale} were older than {request.max_staleness} versions and are generated again"] if stale else []
        return "; ".join(parts)

    def acknowledge(self, lease: str, names: list[str] | None) -> LeaseStatus:
        """Remove the lease's groups, or those named. Raises UnknownLease."""
        return self._end(lease, names, "acknowledged", bodies=("requests", "results"))

    def release(self, lease: str, names: list[str] | None) -> LeaseStatus:
        """Hand them out again. Raises UnknownLease."""
        return self._end(lease, names, "finished")

    def _end(self, lease: str, names: list[str] | None, state: str, bodies: tuple[str, ...] = ()) -> LeaseStatus:
        with self.tables.transaction() as execute:
            held = execute("SELECT arrival, run, id FROM groups WHERE lease = ?", (lease,)).fetchall()
            if not held:
                raise UnknownLease(lease)
            ended = [row for row in held if names is None or row[2] in names]
            arrivals = [arrival for arrival, *_ in ended]
            self.database.executemany(
                "UPDATE groups SET state = ?, lease = NULL WHERE arrival = ?",
                [(state, arrival) for arrival in arrivals],
            )
            self.tables.forget(arrivals, *bodies)
            event = "acknowledged" if state == "acknowledged" else "returned"
            self.tables.log(event, [(run, name) for _, run, name in ended], lease)
            if len(ended) == len(held):
                execute("DELETE FROM leases WHERE id = ?", (lease,))
        groups = [name for *_, name in ended]
        return LeaseStatus(lease=lease, groups=groups, lost=sorted(set(names or ()) - set(groups)))

    def release_run(self, run: str) -> int:
        """Hand out again all that the run has leased: its trainer begins anew. Gives the number of groups."""
        held = "SELECT DISTINCT lease FROM groups WHERE run = ? AND state = 'leased'"
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
        states = dict(self.database.execute("SELECT state, count(*) FROM groups GROUP BY state"))
        finished = self.database.execute("SELECT finished, oldest FROM groups WHERE state = 'finished'").fetchall()
        leases = self.database.execute(
            "SELECT leases.id, deadline, count(*) FROM leases JOIN groups ON lease = leases.id GROUP BY leases.id"
        )
        now = time.time()
        counts = dict(self.database.execute("SELECT name, value FROM counts"))
        waiting = {
            arrival for (arrival,) in self.database.execute("SELECT arrival FROM groups WHERE state = 'waiting'")
        }
        return BatchesStatus(
            waiting=len(waiting - self.generating),  # what is generated may have been cancelled since
            generating=len(self.generating),
            finished=len(finished),
            leased=states.get("leased", 0),
            acknowledged=states.get("acknowledged", 0),
            capacity=self.capacity,
            oldest_seconds=now - min((f for f, _ in finished), default=now),
            oldest_version=min((oldest for _, oldest in finished), default=None),
            ages=sorted((round(now - f, 3) for f, _ in finished), reverse=True),
            leases=[LeaseInfo(lease=name, groups=n, seconds_left=end - now) for name, end, n in leases],
            dropped=counts["dropped"],
            tokens_wasted=counts["wasted_tokens"],
            persistent=self.persistent,
        )

    def log(self) -> Iterator[dict[str, Any]]:
        """Every accepted, finished, dropped, leased, returned, acknowledged and cancelled group, in order."""
        for row in self.database.execute("SELECT time, event, run, id, lease, version FROM log ORDER BY seq"):
            yield dict(zip(("time", "event", "run", "id", "lease", "version"), row, strict=True))
