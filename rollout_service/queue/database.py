"""QueueDatabase: the batch queue's tables in SQLite with a write-ahead log, within a quota of disk.

- Every change happens in a `transaction`, with its lines of the log.
- `groups`, `requests` and `results` hold what is not acknowledged, so the queue's capacity bounds them.
- The file says its FORMAT. A file of another format is refused, so that nothing in it is silently lost or misread.
- `acknowledged` and `log` keep only their newest rows, and are trimmed as they grow. So neither the file nor the time
  that a request takes grows with the number of groups that have passed through.
"""

import hashlib
import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drafters.files.stored_format import OtherFormat

SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
  arrival INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, max_staleness INTEGER, oldest INTEGER, tokens INTEGER, finished REAL, lease TEXT,
  digest BLOB, rounds INTEGER NOT NULL DEFAULT 0,
  UNIQUE (run, id));
CREATE TABLE IF NOT EXISTS acknowledged (
  seq INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, digest BLOB);
CREATE TABLE IF NOT EXISTS requests (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS results (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_state ON groups (state, priority DESC, arrival);
CREATE INDEX IF NOT EXISTS by_lease ON groups (lease) WHERE lease IS NOT NULL;
CREATE TABLE IF NOT EXISTS leases (id TEXT PRIMARY KEY, seconds REAL NOT NULL, deadline REAL NOT NULL);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS log (
  seq INTEGER PRIMARY KEY, time REAL, event TEXT, run TEXT, id TEXT, lease TEXT, version INTEGER);
"""
FORMAT = 1
"""format of the tables and of the wire types in them; tests/unit/test_stored_formats.py says when to raise it"""
UNNUMBERED = 1
"""format of files from before formats had numbers, in which the number is 0; the oldest lack the columns in ADDED"""
ADDED = {"groups": {"digest", "rounds"}}
"""columns that version 0.1.0 did not have"""
INSTEAD = "start the version that wrote it until its groups are trained on, or move it away, which forgets them"
COUNTED = ("dropped", "wasted_tokens", "acknowledged")
LOG_ROWS = 100_000
"""lines of the log that are kept, if the quota has room for them"""
REMEMBERED = 100_000
"""acknowledged ids that are remembered, over all runs, if the quota has room for them"""
LOG_SHARE, REMEMBERED_SHARE = 0.25, 0.125
"""shares of the quota; with a small quota fewer lines and ids are kept, so that they never fill it"""
LOG_BYTES, REMEMBERED_BYTES = 128, 96
"""bytes of a row with its index"""
LOG_NAME = 64
"""characters of a run's or a group's name that the log keeps"""


class Unavailable(RuntimeError):
    """The queue cannot take or change anything now. `status` is 429 when it is full, and 507 when its disk is full."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class QueueDatabase:
    def __init__(self, file: Path | None, disk_mib: int):
        self.connection = sqlite3.connect(file or ":memory:", isolation_level=None, check_same_thread=False)
        if file is not None:
            self._check_format(file)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        page_size = self.value("PRAGMA page_size")
        self.pages = (disk_mib << 20) // page_size
        self.connection.execute(f"PRAGMA max_page_count = {self.pages}")
        quota = self.pages * page_size
        self.log_rows = min(LOG_ROWS, int(quota * LOG_SHARE / LOG_BYTES))
        self.remembered = min(REMEMBERED, int(quota * REMEMBERED_SHARE / REMEMBERED_BYTES))
        self.connection.executescript(SCHEMA)
        with self.transaction() as execute:
            execute(f"INSERT OR IGNORE INTO counts VALUES {', '.join(['(?, 0)'] * len(COUNTED))}", COUNTED)
            self._take_over_older_file(execute)
            execute(f"PRAGMA user_version = {FORMAT}")
            self._trim("log", self.log_rows)
            self._trim("acknowledged", self.remembered)

    def _check_format(self, file: Path) -> None:
        """Raises OtherFormat, and leaves the file as it was, when it has another number or other columns."""
        number, there = self.value("PRAGMA user_version"), _columns(self.connection)
        fresh = sqlite3.connect(":memory:")
        fresh.executescript(SCHEMA)
        fits = all(
            there.get(table, columns) in (columns, columns - ADDED.get(table, set()))
            for table, columns in _columns(fresh).items()
        )
        if (number or UNNUMBERED) != FORMAT or not fits:
            raise OtherFormat(file, number if fits else f"{number} with other columns", FORMAT, INSTEAD)

    def _take_over_older_file(self, execute: Any) -> None:
        """Convert a file of version 0.1.0, which kept acknowledged groups among the others, and no digests."""
        if "digest" in [column[1] for column in execute("PRAGMA table_info(groups)")]:
            return
        execute("ALTER TABLE groups ADD COLUMN digest BLOB")
        execute("ALTER TABLE groups ADD COLUMN rounds INTEGER NOT NULL DEFAULT 0")
        old = execute("SELECT run, id, digest FROM groups WHERE state = 'acknowledged' ORDER BY arrival").fetchall()
        execute("DELETE FROM groups WHERE state = 'acknowledged'")
        self.remember(old)

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
        lines = [(time.time(), event, run[:LOG_NAME], name[:LOG_NAME], lease, version) for run, name in rows]
        self.connection.executemany(
            "INSERT INTO log (time, event, run, id, lease, version) VALUES (?, ?, ?, ?, ?, ?)", lines
        )
        self._trim("log", self.log_rows)

    def remember(self, rows: Sequence[tuple[str, str, bytes | None]]) -> None:
        """Remember groups that are acknowledged now, by run, id and digest."""
        self.connection.executemany(
            "INSERT INTO acknowledged (key, digest) VALUES (?, ?)",
            [(_key(run, name), digest) for run, name, digest in rows],
        )
        self._trim("acknowledged", self.remembered)
        self.count("acknowledged", len(rows))

    def remembered_digest(self, run: str, name: str) -> tuple[bytes | None] | None:
        """The digest of an acknowledged group, in a tuple; None for an unknown group. A digest is None if an older
        version kept none."""
        return self.connection.execute("SELECT digest FROM acknowledged WHERE key = ?", (_key(run, name),)).fetchone()

    def _trim(self, table: str, rows: int) -> None:
        self.connection.execute(f"DELETE FROM {table} WHERE seq <= (SELECT max(seq) FROM {table}) - ?", (rows,))

    def filled(self) -> float:
        return (self.value("PRAGMA page_count") - self.value("PRAGMA freelist_count")) / self.pages

    def forget(self, arrivals: list[int], *tables: str) -> None:
        """Delete the bodies of groups. They are rows of their own, because deleting a row makes room, and emptying a
        column does not."""
        for table in tables:
            self.connection.executemany(f"DELETE FROM {table} WHERE arrival = ?", [(arrival,) for arrival in arrivals])

    def count(self, name: str, more: int) -> None:
        self.connection.execute("UPDATE counts SET value = value + ? WHERE name = ?", (more, name))


def _columns(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """The names of each table's columns."""
    query = "SELECT t.name, c.name FROM sqlite_schema AS t, pragma_table_info(t.name) AS c WHERE t.type = 'table'"
    columns: dict[str, set[str]] = defaultdict(set)
    for table, column in connection.execute(query):
        columns[table].add(column)
    return columns


def _key(run: str, name: str) -> bytes:
    """16 bytes, however long the names are, so that remembered ids have a known size."""
    return hashlib.blake2b(json.dumps([run, name]).encode(), digest_size=16).digest()
