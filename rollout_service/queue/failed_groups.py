"""FailedGroups: groups that cannot be generated, or read back. Each is kept with its reason, and never tried again."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from rollout_service.protocol import FailedGroup
from rollout_service.queue.database import QueueDatabase
from rollout_service.queue.records import stored_metadata

NOT_LEASED = "state = 'failed' AND lease IS NULL"


class FailedGroups:
    def __init__(self, tables: QueueDatabase):
        self.tables = tables
        self.on_failed: Callable[[str, str], None] = lambda name, reason: None
        """called with the id of a group that failed, and why"""

    def add(self, reasons: dict[int, str]) -> list[tuple[str, str]]:
        """Mark groups as failed, within a transaction. `reasons` says why, by arrival. Returns (id, reason) of those
        whose run was not cancelled; pass it to `tell` once the transaction is over."""
        added = []
        for arrival, reason in reasons.items():
            row = self.tables.connection.execute(
                "UPDATE groups SET state = 'failed', finished = ? WHERE arrival = ? RETURNING run, id",
                (time.time(), arrival),
            ).fetchone()
            if row is None:
                continue
            body = self.tables.value("SELECT body FROM requests WHERE arrival = ?", arrival)
            failed = FailedGroup(id=row[1], error=reason, metadata=stored_metadata(body))
            self.tables.connection.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?)", (arrival, failed.model_dump_json())
            )
            self.tables.forget([arrival], "requests")
            self.tables.log("failed", [row])
            added.append((row[1], reason))
        return added

    def tell(self, added: Iterable[tuple[str, str]]) -> None:
        for name, reason in added:
            self.on_failed(name, reason)

    def any_of(self, run: str) -> bool:
        """Whether the run has a failed group that is not leased."""
        return self.tables.value(f"SELECT count(*) FROM groups WHERE run = ? AND {NOT_LEASED}", run) > 0

    def of(self, run: str) -> list[Any]:
        """(arrival, id, body) of the run's failed groups that are not leased, in the order of arrival."""
        return self.tables.connection.execute(
            f"SELECT arrival, id, body FROM groups JOIN results USING (arrival) WHERE run = ? AND {NOT_LEASED} "
            "ORDER BY arrival",
            (run,),
        ).fetchall()
