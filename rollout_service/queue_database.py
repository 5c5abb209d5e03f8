"""QueueDatabase: the batch queue's tables in SQLite with a write-ahead log, within a quota of disk.

Every change happens in a `transaction`, with its lines of the log.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
  arrival INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, max_staleness INTEGER, oldest INTEGER, tokens INTEGER, finished REAL, lease TEXT,
  UNIQUE (run, id));
CREATE TABLE IF NOT EXISTS requests (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS results (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_state ON groups (state, priority DESC, arrival);
CREATE INDEX IF NOT EXISTS by_lease ON groups (lease) WHERE lease IS NOT NULL;
CREATE TABLE IF NOT EXISTS leases (id TEXT PRIMARY KEY, seconds REAL NOT NULL, deadline REAL NOT NULL);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS log (
  seq INTEGER PRIMARY KEY, time REAL, event TEXT, run TEXT, id TEXT, lease TEXT, version INTEGER);
"""
COUNTED = ("dropped", "wasted_tokens")
LOG_ROWS = 1_000_000
"""lines of the log that a restart keeps"""


class Unavailable(RuntimeError):
    """The queue cannot take or change anything now: 429 when it is full, 507 when its disk is."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class QueueDatabase:
    def __init__(self, file: Path | None, disk_mib: int):
        self.connection = sqlite3.connect(file or ":memory:", isolation_level=None, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        page_size = self.value("PRAGMA page_size")
        self.pages = (disk_mib << 20) // page_size
        self.connection.execute(f"PRAGMA max_page_count = {self.pages}")
        self.connection.executescript(SCHEMA)
        with self.transaction() as execute:
            execute("INSERT OR IGNORE INTO counts VALUES (?, 0), (?, 0)", COUNTED)
            execute("DELETE FROM log WHERE seq <= (SELECT max(seq) FROM log) - ?", (LOG_ROWS,))

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection.execute
            self.connection.execute("COMMIT")
        except BaseException as error:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise Unavailable(507, f"the queue could not be written: {error}") from error
            raise

    def value(self, query: str, *parameters: Any) -> Any:
        return self.connection.execute(query, parameters).fetchone()[0]

    def log(self, event: str, rows: Sequence[tuple[str, str]], lease: str | None = None, version: int = 0) -> None:
        lines = [(time.time(), event, run, name, lease, version) for run, name in rows]
        self.connection.executemany(
            "INSERT INTO log (time, event, run, id, lease, version) VALUES (?, ?, ?, ?, ?, ?)", lines
        )

    def filled(self) -> float:
        return (self.value("PRAGMA page_count") - self.value("PRAGMA freelist_count")) / self.pages

    def forget(self, arrivals: list[int], *tables: str) -> None:
        """Bodies are rows of their own: deleting them makes room, which emptying a column does not."""
        for table in tables:
            self.connection.executemany(f"DELETE FROM {table} WHERE arrival = ?", [(arrival,) for arrival in arrivals])

    def count(self, name: str, more: int) -> None:
        self.connection.execute("UPDATE counts SET value = value + ? WHERE name = ?", (more, name))
