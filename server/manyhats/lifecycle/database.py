"""The registry's SQLite file: its tables, how they came to be, and one way to write to them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from manyhats.errors import ConfigError
from manyhats.lifecycle import tables

_T = TypeVar("_T")

_TRIGGERS: Final = {
    "audit_keeps_rows": """
        CREATE TRIGGER audit_keeps_rows BEFORE DELETE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
    "audit_keeps_words": """
        CREATE TRIGGER audit_keeps_words BEFORE UPDATE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
}

_Step = str | Callable[[sqlite3.Connection], None]

_MIGRATIONS: Final[tuple[tuple[_Step, ...], ...]] = (
    (
        # The counter outlives its versions, so that name@3 never comes to mean something else.
        """
        CREATE TABLE names (
            name TEXT PRIMARY KEY,
            last_version INTEGER NOT NULL
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE adapters (
            name TEXT NOT NULL REFERENCES names (name),
            version INTEGER NOT NULL,
            digest TEXT NOT NULL,
            tenant TEXT NOT NULL,
            family TEXT NOT NULL,
            max_rank INTEGER NOT NULL,
            nbytes INTEGER NOT NULL,
            created INTEGER NOT NULL,
            source TEXT NOT NULL,
            PRIMARY KEY (name, version)
        ) WITHOUT ROWID
        """,
    ),
    ("ALTER TABLE adapters ADD COLUMN virtual_tokens INTEGER NOT NULL DEFAULT 0",),
    # A composition is all here: no folder of the store has its digest.
    ("ALTER TABLE adapters ADD COLUMN composition TEXT",),
    (
        "ALTER TABLE adapters ADD COLUMN state TEXT NOT NULL DEFAULT 'ready'",
        "ALTER TABLE adapters ADD COLUMN actor TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE adapters ADD COLUMN revision TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE adapters ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}'",
        """
        CREATE TABLE routes (
            name TEXT PRIMARY KEY REFERENCES names (name),
            route TEXT NOT NULL
        ) WITHOUT ROWID
        """,
        # Until now a name has meant its newest version.
        """
        INSERT INTO routes
        SELECT name, '{"stable":' || max(version) || '}' FROM adapters GROUP BY name
        """,
        """
        CREATE TABLE audit (
            seq INTEGER PRIMARY KEY,
            at TEXT NOT NULL,
            actor TEXT NOT NULL,
            action TEXT NOT NULL,
            name TEXT NOT NULL,
            reason TEXT NOT NULL,
            before TEXT NOT NULL,
            after TEXT NOT NULL,
            previous TEXT NOT NULL,
            hash TEXT NOT NULL
        )
        """,
        "CREATE INDEX audit_by_name ON audit (name, seq)",
        *_TRIGGERS.values(),
        # The key of the hash that draws a caller to one side of a canary, the same after a restart.
        "CREATE TABLE draw (key BLOB NOT NULL)",
        "INSERT INTO draw VALUES (randomblob(32))",
    ),
    # One JSON document a name, see documents.py: what is added to a version needs no column now.
    (
        "CREATE TABLE documents (name TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID",
        tables.to_documents,
        "DROP TABLE routes",
        "DROP TABLE adapters",
        "DROP TABLE names",
    ),
    # What is too long for a document: what an adapter is evaluated on, and what came of it.
    ("CREATE TABLE texts (key TEXT PRIMARY KEY, text TEXT NOT NULL)",),
)


def open_database(path: Path, *, migrate: bool = True) -> sqlite3.Connection:
    """The database, brought to the newest format. Every commit waits for the disk.

    Raises ConfigError where the file is of a newer format, or of an older one that must stay what
    it is (not ``migrate``: its owner may be running); sqlite3.Error where it is no database.
    """
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise ConfigError(
                f"the registry {path} has format {version}, this server knows {len(_MIGRATIONS)}"
            )
        if version < len(_MIGRATIONS) and not migrate:
            raise ConfigError(
                f"the registry {path} has format {version}; start a server of this version first"
            )
        for number, steps in enumerate(_MIGRATIONS[version:], version + 1):
            transaction(db, partial(_migrate, number=number, steps=steps))
    except BaseException:
        db.close()
        raise
    return db


def transaction(
    db: sqlite3.Connection, run: Callable[[sqlite3.Connection], _T], mode: str = "IMMEDIATE"
) -> _T:
    """``run`` in one transaction: all of it is on the disk afterwards, or none.

    ``mode``: ``DEFERRED`` for what only reads.
    """
    db.execute(f"BEGIN {mode}")
    try:
        result = run(db)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return result


@contextmanager
def rewritable(db: sqlite3.Connection) -> Iterator[None]:
    """Within the caller's transaction, the audit log may be replaced: a backup is put back."""
    for name in _TRIGGERS:
        db.execute(f"DROP TRIGGER {name}")
    yield
    for statement in _TRIGGERS.values():
        db.execute(statement)


def _migrate(db: sqlite3.Connection, *, number: int, steps: Sequence[_Step]) -> None:
    for step in steps:
        if isinstance(step, str):
            db.execute(step)
        else:
            step(db)
    db.execute(f"PRAGMA user_version = {number}")
