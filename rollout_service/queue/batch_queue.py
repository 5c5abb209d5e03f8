"""BatchQueue: groups from their arrival until they are generated. After that, FinishedGroups has them.

    waiting --(generated)--> finished --(lease)--> leased --(ack)--> acknowledged
     | ^----(too stale)---------'  ^---(nack, or the lease's end)---'
     '--(cannot be generated)--> failed --(lease)--> failed, under a lease --(ack)--> acknowledged

- Every change is one transaction, with its lines of the log. It is on disk before it is answered (synchronous = FULL).
- The client chooses a group's id. Sending an id again with the same request changes nothing. With another request it is
  an error. The newest REMEMBERED acknowledged ids are known, without their tokens, and never handed out again. An older
  id that is sent again is a new group.
- Only BackgroundGeneration knows which groups are being generated. Here they are `waiting`, so they wait again after a
  restart.
"""

import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from rollout_service.protocol import BatchesStatus, Group, GroupRequest, PromptsRequest, PromptsStatus
from rollout_service.queue.database import QueueDatabase, Unavailable
from rollout_service.queue.failed_groups import FailedGroups
from rollout_service.queue.finished_groups import FinishedGroups
from rollout_service.queue.queue_status import queue_status
from rollout_service.queue.records import request_digest, stored_request, what_is_wrong

FILLED = 0.9
"""share of the quota above which new prompts are refused; the rest is for finishing groups that are in the queue"""
FILLED_FOR_RESULTS = 0.97
"""share above which finished groups stay in memory; the rest is for leases and acknowledgements, which make room"""


class OtherRequest(ValueError):
    """Ids that are known with another request. `positions` are those of their groups in the request."""

    def __init__(self, positions: list[int]):
        super().__init__(f"groups {positions} have ids that are known with other requests")
        self.positions = positions


class Waiting(NamedTuple):
    """A group to generate. `arrival` is its key in the queue. `rounds` counts how often its generation was given up
    because its engines had died."""

    arrival: int
    request: GroupRequest
    max_staleness: int | None
    rounds: int


class BatchQueue:
    """At most `capacity` groups that are not acknowledged, in a database of at most `disk_mib`. Times are seconds since
    the epoch.

    Use: `add` prompts; `finish` or `fail` what `next_waiting` returns; `finished.lease` and `finished.acknowledge`.
    """

    def __init__(self, file: Path | None, capacity: int, disk_mib: int):
        self.capacity, self.persistent = capacity, file is not None
        self.tables = QueueDatabase(file, disk_mib)
        self.database = self.tables.connection
        self.failed = FailedGroups(self.tables)
        self.finished = FinishedGroups(self.tables, self.failed)

    def close(self) -> None:
        self.database.close()

    # --- prompts in ---

    def add(self, request: PromptsRequest, groups: Sequence[GroupRequest]) -> PromptsStatus:
        """Take the request's `groups`, which were admitted. All are in the queue when this returns. Otherwise none is:
        it raises Unavailable, or OtherRequest for ids that are known with another request."""
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
        """The digest of a group that was sent before, in a tuple, and whether the group is acknowledged."""
        in_queue = self.database.execute("SELECT digest FROM groups WHERE run = ? AND id = ?", (run, name)).fetchone()
        if in_queue is not None:
            return in_queue, False
        return self.tables.remembered_digest(run, name), True

    def _make_sure_of_room(self, new: int) -> None:
        in_queue = self.tables.value("SELECT count(*) FROM groups")
        if in_queue + new > self.capacity:
            capacity = f"queue.capacity is {self.capacity}"
            raise Unavailable(429, f"{in_queue} groups are in the queue and {new} more do not fit: {capacity}")
        if self.tables.filled() > FILLED:
            raise Unavailable(
                507, f"the queue's disk is {self.tables.filled():.0%} full: acknowledge groups, or raise queue.disk_mib"
            )

    def cancel(self, run: str) -> list[int]:
        """Forget the run's groups that are not acknowledged. Returns their arrivals."""
        with self.tables.transaction() as execute:
            rows = execute("DELETE FROM groups WHERE run = ? RETURNING arrival, id", (run,)).fetchall()
            self.tables.forget([arrival for arrival, _ in rows], "requests", "results")
            execute("DELETE FROM leases WHERE id NOT IN (SELECT lease FROM groups WHERE lease IS NOT NULL)")
            self.tables.log("cancelled", [(run, name) for _, name in rows])
        return [arrival for arrival, _ in rows]

    # --- generation ---

    def next_waiting(self, generating: Set[int] = frozenset(), suspects: bool = True) -> Waiting | None:
        """The first group to generate whose arrival is not in `generating`. Without `suspects`, groups whose engines
        have died before are left out."""
        while (row := self._first_waiting(generating, suspects)) is not None:
            arrival, max_staleness, rounds = row
            try:
                request = stored_request(self.tables.value("SELECT body FROM requests WHERE arrival = ?", arrival))
            except ValidationError as error:
                self.fail(arrival, f"the stored request cannot be read: {what_is_wrong(error)}")
                continue
            return Waiting(arrival, request, max_staleness, rounds)
        return None

    def _first_waiting(self, generating: Set[int], suspects: bool) -> Any:
        rows = self.database.execute(
            "SELECT arrival, max_staleness, rounds FROM groups WHERE state = 'waiting' AND (? OR rounds = 0) "
            "ORDER BY priority DESC, arrival",
            (suspects,),
        )
        return next((row for row in rows if row[0] not in generating), None)

    def finish(self, arrival: int, group: Group, version: int) -> None:
        """Keep a finished group. `version` is the policy in service. Raises Unavailable when it cannot be kept."""
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

    def fail(self, arrival: int, reason: str) -> None:
        """The group cannot be generated. It is handed out as failed, and not tried again."""
        with self.tables.transaction():
            added = self.failed.add({arrival: reason})
        self.failed.tell(added)

    def engines_died(self, arrival: int) -> int:
        """Count a round of engines that died with the group. Returns the number so far, rounds before a restart
        included, or 0 if the run was cancelled."""
        with self.tables.transaction() as execute:
            row = execute("UPDATE groups SET rounds = rounds + 1 WHERE arrival = ? RETURNING rounds", (arrival,))
            return next(row, (0,))[0]

    def count(self, *, dropped: int = 0, wasted_tokens: int = 0) -> None:
        """Count what was aborted in the engines before it was finished."""
        with self.tables.transaction():
            self.tables.count("dropped", dropped)
            self.tables.count("wasted_tokens", wasted_tokens)

    # --- how it is doing ---

    def status(self, generating: Set[int] = frozenset()) -> BatchesStatus:
        """`generating`: the arrivals of the groups that are being generated."""
        return queue_status(self.tables, generating, self.capacity, self.persistent)

    def log(self) -> Iterator[dict[str, Any]]:
        """The newest lines of the log, in order: every accepted, finished, failed, dropped, leased, returned,
        acknowledged and cancelled group."""
        for row in self.database.execute("SELECT time, event, run, id, lease, version FROM log ORDER BY seq"):
            yield dict(zip(("time", "event", "run", "id", "lease", "version"), row, strict=True))
