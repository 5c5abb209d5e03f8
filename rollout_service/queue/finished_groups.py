"""FinishedGroups: generated groups, handed out under leases until they are acknowledged, and never too stale.

- The staleness bound is checked in `lease`, whatever happened before. `drop_stale` only saves work.
- A lease that is over returns its groups. So do the leases of a trainer that starts again.
- Every lease hands out the failed groups of its run together with the finished ones.
"""

import time
import uuid
from typing import Any

from rollout_service.protocol import Batch, LeaseRequest, LeaseStatus
from rollout_service.queue.database import QueueDatabase
from rollout_service.queue.failed_groups import FailedGroups
from rollout_service.queue.queue_status import why_short
from rollout_service.queue.records import stored_failure, stored_results


class UnknownLease(LookupError):
    """A lease that was never given, has been acknowledged or returned, or is over."""


class FinishedGroups:
    """Times are seconds since the epoch."""

    def __init__(self, tables: QueueDatabase, failed: FailedGroups):
        self.tables, self.failed = tables, failed
        self.database = tables.connection
        with self.tables.transaction() as execute:
            # Nobody could extend a lease while the service was down.
            execute("UPDATE leases SET deadline = max(deadline, ? + seconds)", (time.time(),))

    def available(self, request: LeaseRequest, version: int) -> int:
        """The number of finished groups that are fresh enough to be leased."""
        oldest = version - request.max_staleness if request.max_staleness is not None else 0
        return self.tables.value(
            "SELECT count(*) FROM groups WHERE state = 'finished' AND run = ? AND oldest >= ? "
            "AND (max_staleness IS NULL OR oldest >= ? - max_staleness)",
            request.run, oldest, version,
        )  # fmt: skip

    def should_wait(self, request: LeaseRequest, version: int) -> bool:
        """Whether the batch is not complete, and waiting may complete it.

        A failed group does not cut a batch short while other groups of its run are to come. It ends the wait when none
        is: then only the client can complete the batch, and must learn of the failure first.
        """
        available = self.available(request, version)
        if available >= request.groups:
            return False
        if not self.failed.any_of(request.run):
            return True
        to_come = "SELECT count(*) FROM groups WHERE run = ? AND state IN ('waiting', 'finished')"
        return self.tables.value(to_come, request.run) > available

    def drop_stale(self, version: int) -> None:
        """Let finished groups that can no longer be handed out wait again. `version` is the policy in service."""
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

    def lease(self, request: LeaseRequest, version: int) -> Batch:
        """Lease the first fresh groups of the run, at most as many as asked for, and all of its failed ones. `version`
        is that of the policy that will be trained on them: the one in service, or the trainer's own if it is newer.
        Groups that are too stale for it are dropped."""
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
            newly_failed = self.failed.add(unreadable)
            failed = self.failed.of(request.run)
            rows = [row for row in stored if row[0] in groups] + failed
            if rows:
                execute("INSERT INTO leases VALUES (?, ?, ?)", (name, request.seconds, now + request.seconds))
                self.database.executemany(
                    "UPDATE groups SET state = CASE state WHEN 'finished' THEN 'leased' ELSE state END, lease = ? "
                    "WHERE arrival = ?",
                    [(name, row[0]) for row in rows],
                )
                self.tables.log("leased", [(request.run, row[1]) for row in rows], name, version)
        self.failed.tell(newly_failed)
        return Batch(
            lease=name if rows else None,
            groups=list(groups.values()),
            failed=[stored_failure(body) for _, _, body in failed],
            version=version,
            short=None if len(groups) == request.groups else why_short(self.tables, request, len(groups), stale),
        )

    def acknowledge(self, lease: str, names: list[str] | None) -> LeaseStatus:
        """Remove the lease's groups, or those named, failed ones included. Raises UnknownLease."""
        with self.tables.transaction() as execute:
            ended, status = self._ended(lease, names)
            self.database.executemany("DELETE FROM groups WHERE arrival = ?", [(row[0],) for row in ended])
            self.tables.forget([arrival for arrival, *_ in ended], "requests", "results")
            self.tables.remember([(run, name, digest) for _, run, name, digest in ended])
            self._close(execute, lease, "acknowledged", ended)
        return status

    def release(self, lease: str, names: list[str] | None) -> LeaseStatus:
        """Let the lease's groups, or those named, be handed out again. Raises UnknownLease."""
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
        """Let all groups that the run has leased be handed out again, because its trainer starts again. Returns their
        number."""
        held = "SELECT DISTINCT lease FROM groups WHERE run = ? AND lease IS NOT NULL"
        leases = self.database.execute(held, (run,)).fetchall()
        return sum(len(self.release(lease, None).groups) for (lease,) in leases)

    def extend(self, lease: str, seconds: float) -> LeaseStatus:
        """Let the lease end this many seconds from now. Raises UnknownLease."""
        with self.tables.transaction() as execute:
            execute("UPDATE leases SET seconds = ?, deadline = ? WHERE id = ?", (seconds, time.time() + seconds, lease))
            held = [name for (name,) in execute("SELECT id FROM groups WHERE lease = ?", (lease,))]
        if not held:
            raise UnknownLease(lease)
        return LeaseStatus(lease=lease, groups=held, lost=[])

    def expire_leases(self) -> int:
        """Let the groups of leases that are over be handed out again. Returns their number."""
        over = [name for (name,) in self.database.execute("SELECT id FROM leases WHERE deadline < ?", (time.time(),))]
        return sum(len(self.release(name, None).groups) for name in over)
