"""What drift detection keeps in one SQLite file: embedded, WAL, every commit on the disk."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from manyhats.errors import ConfigError, ServiceError

_T = TypeVar("_T")
_FORMAT: Final = 1
_BUSY_S: Final = 30.0


class SqliteDriftStore:
    """Implements ``DriftStore`` in the file ``path``.

    Raises ConfigError where the file cannot be opened or is of a newer format.
    """

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            [found] = self._db.execute("PRAGMA user_version").fetchone()
            if found > _FORMAT:
                raise ConfigError(f"{path} has format {found}, this server knows {_FORMAT}")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS drift (key TEXT PRIMARY KEY, text TEXT NOT NULL) "
                "WITHOUT ROWID"
            )
            self._db.execute(f"PRAGMA user_version = {_FORMAT}")
        except sqlite3.Error as exc:
            raise ConfigError(f"the drift records in {path} cannot be opened: {exc}") from exc

    def get(self, key: str) -> str | None:
        """See DriftStore."""
        row = self._run(
            lambda db: db.execute("SELECT text FROM drift WHERE key = ?", (key,)).fetchone()
        )
        return None if row is None else str(row[0])

    def put(self, key: str, text: str) -> None:
        """See DriftStore."""
        self._run(
            lambda db: db.execute(
                "INSERT INTO drift VALUES (?, ?) ON CONFLICT (key) DO UPDATE "
                "SET text = excluded.text",
                (key, text),
            )
        )

    def put_new(self, key: str, text: str) -> str:
        """See DriftStore."""

        def insert(db: sqlite3.Connection) -> str:
            db.execute("INSERT INTO drift VALUES (?, ?) ON CONFLICT DO NOTHING", (key, text))
            [kept] = db.execute("SELECT text FROM drift WHERE key = ?", (key,)).fetchone()
            return str(kept)

        return self._run(insert)

    def items(self, prefix: str) -> Mapping[str, str]:
        """See DriftStore."""
        rows = self._run(
            lambda db: db.execute(
                "SELECT key, text FROM drift WHERE substr(key, 1, ?) = ? ORDER BY key",
                (len(prefix), prefix),
            ).fetchall()
        )
        return dict(rows)

    def remove(self, key: str) -> None:
        """See DriftStore."""
        self._run(lambda db: db.execute("DELETE FROM drift WHERE key = ?", (key,)))

    def close(self) -> None:
        """See DriftStore."""
        with self._lock:
            self._db.close()

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        with self._lock:
            try:
                return work(self._db)
            except sqlite3.Error as exc:
                raise ServiceError(f"the store of drift detection failed: {exc}") from exc
