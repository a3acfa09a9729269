"""Usage in the registry's SQLite file."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Final

from manyhats.errors import ConfigError, ServiceError
from manyhats.tenancy.usage import Counts, Tally, UsageKey

_BUSY_S: Final = 30.0
_BATCHES_KEPT: Final = 1000
_TABLES: Final = (
    # The adapter '' is the bare base: a key's column cannot be null.
    "CREATE TABLE IF NOT EXISTS usage (day INTEGER NOT NULL, tenant TEXT NOT NULL, "
    "adapter TEXT NOT NULL, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, "
    "output_tokens INTEGER NOT NULL, resident_s INTEGER NOT NULL DEFAULT 0, "
    "PRIMARY KEY (day, tenant, adapter)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS usage_batches (n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL)",
)
_WITH_RESIDENCE: Final = "ALTER TABLE usage ADD COLUMN resident_s INTEGER NOT NULL DEFAULT 0"
"""For a file of a server that did not count it."""


class SqliteUsageStore:
    """Implements ``UsageStore`` in the file ``path``, beside whatever else lies in it.

    Raises ConfigError where the file cannot be opened.
    """

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=_BUSY_S)
            self._db.execute("PRAGMA journal_mode = WAL")
            with self._db:
                for table in _TABLES:
                    self._db.execute(table)
                columns = {row[1] for row in self._db.execute("PRAGMA table_info(usage)")}
                if "resident_s" not in columns:
                    self._db.execute(_WITH_RESIDENCE)
        except sqlite3.Error as exc:
            raise ConfigError(f"the usage in {path} cannot be opened: {exc}") from exc

    def add(self, batch: str, tally: Tally, oldest: int) -> None:
        """See UsageStore."""
        rows = [(key.day, key.tenant, key.adapter or "", *n) for key, n in tally.items()]
        try:
            with self._lock, self._db as db:
                added = db.execute("INSERT OR IGNORE INTO usage_batches (id) VALUES (?)", (batch,))
                if not added.rowcount:
                    return
                db.executemany(
                    "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (day, tenant, adapter) DO UPDATE SET "
                    "requests = requests + excluded.requests, "
                    "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                    "output_tokens = output_tokens + excluded.output_tokens, "
                    "resident_s = resident_s + excluded.resident_s",
                    rows,
                )
                db.execute("DELETE FROM usage WHERE day < ?", (oldest,))
                newest = added.lastrowid or 0
                db.execute("DELETE FROM usage_batches WHERE n <= ?", (newest - _BATCHES_KEPT,))
        except sqlite3.Error as exc:
            raise ServiceError(f"the usage cannot be written: {exc}") from exc

    def read(self, since: int) -> Tally:
        """See UsageStore."""
        try:
            with self._lock:
                rows = self._db.execute("SELECT * FROM usage WHERE day >= ?", (since,)).fetchall()
        except sqlite3.Error as exc:
            raise ServiceError(f"the usage cannot be read: {exc}") from exc
        return {
            UsageKey(day, tenant, adapter or None): Counts(*counts)
            for day, tenant, adapter, *counts in rows
        }

    def replace(self, tally: Tally) -> None:
        """See UsageStore."""
        rows = [(key.day, key.tenant, key.adapter or "", *n) for key, n in tally.items()]
        try:
            with self._lock, self._db as db:
                db.execute("DELETE FROM usage")
                db.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as exc:
            raise ServiceError(f"the usage cannot be written: {exc}") from exc

    def close(self) -> None:
        """See UsageStore."""
        with self._lock:
            self._db.close()
