"""The registry in a SQLite file: embedded, WAL, every commit on the disk, one process at a time."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from manyhats.adapters.lock import FileLock
from manyhats.errors import ConfigError, ServiceError
from manyhats.lifecycle import audit
from manyhats.lifecycle.audit import AuditEntry
from manyhats.lifecycle.database import open_database, rewritable, transaction
from manyhats.lifecycle.store import Documents, Dump, Head, StaleHeadError, Texts

_T = TypeVar("_T")


class SqliteRegistryStore:
    """Implements ``RegistryStore`` in the file ``path``.

    Raises ConfigError where the file is not a registry, is of a newer format, or is in use by
    another process. ``exclusive=False`` opens one that is there beside its owner, to read it.
    """

    shared = False

    def __init__(self, path: Path, *, exclusive: bool = True) -> None:
        if not exclusive and not path.is_file():
            raise ConfigError(f"there is no registry {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        own = path.with_name(path.name + ".lock")
        self._owner = FileLock(own) if exclusive else None
        try:
            self._db = open_database(path, migrate=exclusive)
            [self._key] = self._db.execute("SELECT key FROM draw").fetchone()
        except sqlite3.Error as exc:
            self._release()
            raise ConfigError(f"the registry {path} cannot be opened: {exc}") from exc
        except ConfigError:
            self._release()
            raise

    @property
    def key(self) -> bytes:
        """See RegistryStore."""
        return bytes(self._key)

    def head(self) -> Head:
        """See RegistryStore."""
        return self._run("read", _head)

    def read(self) -> tuple[Head, Documents]:
        """See RegistryStore."""
        query = "SELECT name, text FROM documents"
        return self._run("read", lambda db: (_head(db), dict(db.execute(query))))

    def read_names(self, names: Sequence[str]) -> tuple[Head, Documents]:
        """See RegistryStore."""

        def read(db: sqlite3.Connection) -> tuple[Head, Documents]:
            query = "SELECT text FROM documents WHERE name = ?"
            rows = {name: db.execute(query, (name,)).fetchone() for name in names}
            return _head(db), {name: row[0] for name, row in rows.items() if row}

        return self._run("read", read)

    def text(self, key: str) -> str | None:
        """See RegistryStore."""
        query = "SELECT text FROM texts WHERE key = ?"
        row = self._run("read", lambda db: db.execute(query, (key,)).fetchone())
        return row[0] if row else None

    def write(self, entry: AuditEntry, documents: Documents, texts: Texts | None = None) -> None:
        """See RegistryStore."""
        kept = [(key, text) for key, text in (texts or {}).items() if text is not None]
        gone = [(key,) for key, text in (texts or {}).items() if text is None]

        def run(db: sqlite3.Connection) -> None:
            head = _head(db)
            if head == Head.of(entry):
                return
            if head != Head(entry.seq - 1, entry.previous):
                raise StaleHeadError
            db.executemany("INSERT OR REPLACE INTO documents VALUES (?, ?)", documents.items())
            db.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?)", kept)
            db.executemany("DELETE FROM texts WHERE key = ?", gone)
            audit.insert(db, entry)

        self._run("written", run)

    def audit(self, *, name: str | None, after: int, limit: int) -> Sequence[AuditEntry]:
        """See RegistryStore."""
        return self._run("read", lambda db: audit.read(db, name=name, after=after, limit=limit))

    def wait(self, timeout_s: float) -> None:
        """See RegistryStore: nobody else writes."""
        time.sleep(timeout_s)

    def dump(self) -> Dump:
        """See RegistryStore."""

        def run(db: sqlite3.Connection) -> Dump:
            documents = dict(db.execute("SELECT name, text FROM documents"))
            entries = audit.read(db, name=None, after=0, limit=_head(db).seq)
            texts = dict(db.execute("SELECT key, text FROM texts"))
            return Dump(self.key, documents, entries, texts)

        return self._run("read", run)

    def load(self, dump: Dump) -> None:
        """See RegistryStore."""

        def run(db: sqlite3.Connection) -> None:
            with rewritable(db):
                for table in ("documents", "texts", "audit", "draw"):
                    db.execute(f"DELETE FROM {table}")  # noqa: S608 - four words of our own
                db.execute("INSERT INTO draw VALUES (?)", (dump.key,))
                rows = dump.documents.items()
                db.executemany("INSERT INTO documents VALUES (?, ?)", rows)
                db.executemany("INSERT INTO texts VALUES (?, ?)", dump.texts.items())
                for entry in dump.entries:
                    audit.insert(db, entry)

        self._run("written", run)
        self._key = dump.key

    def close(self) -> None:
        """See RegistryStore."""
        with self._lock:
            self._db.close()
            self._release()

    def _release(self) -> None:
        if self._owner is not None:
            self._owner.release()

    def _run(self, verb: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            with self._lock:
                mode = "IMMEDIATE" if verb == "written" else "DEFERRED"
                return transaction(self._db, work, mode)
        except sqlite3.Error as exc:
            raise ServiceError(f"the registry cannot be {verb}: {exc}") from exc


def _head(db: sqlite3.Connection) -> Head:
    return Head(*audit.newest(db))
