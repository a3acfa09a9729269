"""The records of tenancy in the registry's SQLite file: embedded, WAL, every commit on the disk."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, TypeVar

from manyhats.errors import ConfigError, ServiceError
from manyhats.tenancy.store import Change, Kind, StaleRevisionError, Texts

_T = TypeVar("_T")
_FORMAT: Final = 1
_BUSY_S: Final = 30.0
_TABLES: Final = (
    # A number of its own: the registry's user_version in the same file counts its own changes.
    "CREATE TABLE IF NOT EXISTS tenancy (format INTEGER NOT NULL, revision INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS tenancy_records (kind TEXT NOT NULL, id TEXT NOT NULL, "
    "text TEXT NOT NULL, PRIMARY KEY (kind, id)) WITHOUT ROWID",
)


class SqliteTenantStore:
    """Implements ``TenantStore`` in the file ``path``, beside whatever else lies in it.

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
            self._transaction(self._create)
        except sqlite3.Error as exc:
            raise ConfigError(f"the tenants in {path} cannot be opened: {exc}") from exc

    def revision(self) -> int:
        """See TenantStore."""
        return self._run(lambda db: int(_one(db, "SELECT revision FROM tenancy")))

    def read(self) -> tuple[int, Texts]:
        """See TenantStore."""

        def all_of_it(db: sqlite3.Connection) -> tuple[int, Texts]:
            texts: dict[Kind, dict[str, str]] = {kind: {} for kind in Kind}
            for kind, ident, text in db.execute("SELECT kind, id, text FROM tenancy_records"):
                texts[Kind(kind)][ident] = text
            return int(_one(db, "SELECT revision FROM tenancy")), texts

        return self._run(all_of_it)

    def write(self, revision: int, changes: Sequence[Change]) -> int:
        """See TenantStore."""

        def change(db: sqlite3.Connection) -> int:
            if int(_one(db, "SELECT revision FROM tenancy")) != revision:
                raise StaleRevisionError
            for item in changes:
                key = (item.kind.value, item.id)
                db.execute("DELETE FROM tenancy_records WHERE kind = ? AND id = ?", key)
                if item.text is not None:
                    db.execute("INSERT INTO tenancy_records VALUES (?, ?, ?)", (*key, item.text))
            db.execute("UPDATE tenancy SET revision = revision + 1")
            return revision + 1

        return self._run(change)

    def close(self) -> None:
        """See TenantStore."""
        with self._lock:
            self._db.close()

    def _create(self, db: sqlite3.Connection) -> None:
        for table in _TABLES:
            db.execute(table)
        if not _one(db, "SELECT count(*) FROM tenancy"):
            db.execute("INSERT INTO tenancy VALUES (?, 0)", (_FORMAT,))
        found = _one(db, "SELECT format FROM tenancy")
        if found != _FORMAT:
            raise ConfigError(f"the tenants have format {found}, this server knows {_FORMAT}")

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            return self._transaction(work)
        except sqlite3.Error as exc:
            raise ServiceError(f"the store of tenants failed: {exc}") from exc

    def _transaction(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._db)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            return result


def _one(db: sqlite3.Connection, query: str) -> int:
    with closing(db.execute(query)) as cursor:
        return int(cursor.fetchone()[0])
