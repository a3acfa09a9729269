"""The registry: which names exist, and which immutable version each one's counter points to.

SQLite holds the truth; a snapshot in memory answers every read, so that the way of a request
touches no disk. ``add`` and ``delete`` return once the change is on the disk: it survives kill -9.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from manyhats.adapters.lock import FileLock
from manyhats.errors import (
    ConfigError,
    ConflictError,
    PermissionDeniedError,
    RequestError,
    ServiceError,
)
from manyhats.lifecycle.access import Access, OwnersOnly
from manyhats.types import AdapterRef, Digest, TenantId

_T = TypeVar("_T")

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""What an adapter may be called: no '/', no '@', nothing that could trip a path or a header."""

_NAME = re.compile(NAME_PATTERN)
_VERSIONED = re.compile(rf"({NAME_PATTERN})@([1-9][0-9]{{0,17}})")

_MIGRATIONS: Final = (
    # The counter outlives its versions, so that name@3 never comes to mean something else.
    """
    CREATE TABLE names (
        name TEXT PRIMARY KEY,
        last_version INTEGER NOT NULL
    ) WITHOUT ROWID;
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
    ) WITHOUT ROWID;
    """,
    "ALTER TABLE adapters ADD COLUMN virtual_tokens INTEGER NOT NULL DEFAULT 0",
)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One registered version.

    ``nbytes`` is the size of its parts, ``created`` in Unix seconds, ``source`` says where it came
    from (a folder, ``upload``).
    """

    ref: AdapterRef
    tenant: TenantId
    family: str
    max_rank: int
    nbytes: int
    created: int
    source: str


def check_name(name: str) -> None:
    """Raises RequestError unless ``name`` may name an adapter."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"name {name[:140]!r} is not allowed: 1 to 128 characters out of A-Z a-z 0-9 . _ -, "
            "the first a letter or a digit",
            param="name",
        )


class Registry:
    """Names and versions in the SQLite file ``path``. Thread-safe; reads never block on the disk.

    ``max_versions`` bounds the versions kept in all; ``access`` says who may use what is another
    tenant's (default: nobody). Raises ConfigError where the file is not a
    registry, is of a newer format, or is in use by another process (its snapshot would go stale).
    """

    def __init__(
        self,
        path: Path,
        *,
        max_versions: int,
        clock: Callable[[], float] = time.time,
        access: Access | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._max_versions = max_versions
        self._clock = clock
        self.access: Access = access or OwnersOnly()
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._owner = FileLock(path.with_name(path.name + ".lock"))
        try:
            self._db = _open(path)
            self._names = _read(self._db)
        except sqlite3.Error as exc:
            self._owner.release()
            raise ConfigError(f"the registry {path} cannot be opened: {exc}") from exc
        except ConfigError:
            self._owner.release()
            raise
        self._generation = 0
        self._uses = Counter(r.ref.digest for rs in self._names.values() for r in rs)

    def close(self) -> None:
        """Close the file and give it up to another process."""
        with self._writing:
            self._db.close()
            self._owner.release()

    def add(
        self,
        name: str,
        digest: Digest,
        *,
        tenant: TenantId,
        family: str,
        max_rank: int,
        nbytes: int,
        source: str,
        virtual_tokens: int = 0,
    ) -> AdapterRef:
        """The next version of ``name``, or its newest one where that has the same digest already.

        On the disk when it returns. Raises RequestError (the name), ConflictError (the name is
        another tenant's, or the bound of versions is reached), PermissionDeniedError (the tenant's
        quota), ServiceError (the disk).
        """
        check_name(name)
        with self._writing:
            versions = self.versions(name)
            if versions and versions[-1].tenant != tenant:
                raise ConflictError(f"name {name!r} is taken", param="name")
            if versions and versions[-1].ref.digest == digest:
                return versions[-1].ref
            self._check_room()
            self._check_quota(tenant, nbytes)
            created = int(self._clock())
            row = (digest, tenant, family, max_rank, nbytes, created, source, virtual_tokens)
            version = self._write(lambda db: _insert(db, name, row))
            ref = AdapterRef(name, version, digest, virtual_tokens)
            record = AdapterRecord(ref, tenant, family, max_rank, nbytes, created, source)
            with self._reading:
                self._generation += 1
                self._names[name] = (*versions, record)
                self._uses[digest] += 1
            return ref

    def delete(self, name: str) -> tuple[AdapterRecord, ...]:
        """Remove and return every version of ``name``; its counter stays. Raises ServiceError."""
        with self._writing:
            versions = self.versions(name)
            if not versions:
                return ()
            self._write(lambda db: db.execute("DELETE FROM adapters WHERE name = ?", (name,)))
            with self._reading:
                self._generation += 1
                del self._names[name]
                for record in versions:
                    self._uses[record.ref.digest] -= 1
                    if not self._uses[record.ref.digest]:
                        del self._uses[record.ref.digest]
            return versions

    def resolve(self, model: str, tenant: TenantId) -> AdapterRecord | None:
        """The newest version of a name, or exactly ``name@version``, if the tenant may use it."""
        exact = _VERSIONED.fullmatch(model)
        versions = self.versions(exact[1] if exact else model)
        for record in reversed(versions):
            named = exact is None or record.ref.version == int(exact[2])
            if named and self.may_use(record, tenant):
                return record
        return None

    def versions(self, name: str) -> tuple[AdapterRecord, ...]:
        """Every version of ``name``, oldest first; empty where there is none."""
        with self._reading:
            return self._names.get(name, ())

    def list(self, tenant: TenantId) -> list[AdapterRecord]:
        """Every version of each name that the tenant may use, by name, oldest first."""
        with self._reading:
            names = sorted(self._names.items())
        return [r for _, records in names for r in records if self.may_use(r, tenant)]

    def may_use(self, record: AdapterRecord, tenant: TenantId) -> bool:
        """Whether the tenant may use, and know of, the version."""
        return self.access.may_use(record.ref.name, record.tenant, tenant)

    @property
    def generation(self) -> int:
        """Grows with every change."""
        with self._reading:
            return self._generation

    def uses(self, digest: Digest) -> int:
        """How many versions have this content."""
        with self._reading:
            return self._uses[digest]

    def digests(self) -> set[Digest]:
        """The content of every version."""
        with self._reading:
            return set(self._uses)

    def _check_room(self) -> None:
        """Raises ConflictError where no further version may be added."""
        with self._reading:
            count = self._uses.total()
        if count >= self._max_versions:
            raise ConflictError(
                f"{count} adapter versions are registered, the bound is {self._max_versions} "
                "(max_adapters); delete some first"
            )

    def _check_quota(self, tenant: TenantId, nbytes: int) -> None:
        """Raises PermissionDeniedError where one more would be over what the tenant may have."""
        versions, size = self.access.adapter_bounds(tenant)
        if versions is None and size is None:
            return
        mine = [r.nbytes for r in self.list(tenant) if r.tenant == tenant]
        for quota, limit, wanted in (
            ("adapters", versions, len(mine) + 1),
            ("adapter_bytes", size, sum(mine) + nbytes),
        ):
            if limit is not None and wanted > limit:
                raise PermissionDeniedError(
                    f"{quota}: tenant {tenant!r} would have {wanted}, its quota is {limit}; delete "
                    "some first",
                    param=quota,
                )

    def _write(self, run: Callable[[sqlite3.Connection], _T]) -> _T:
        """``run`` in one transaction: all of it is on the disk afterwards, or none."""
        try:
            return _transaction(self._db, run)
        except sqlite3.Error as exc:
            raise ServiceError(f"the registry cannot be written: {exc}") from exc


def _open(path: Path) -> sqlite3.Connection:
    """The database, brought to the newest format. Every commit waits for the disk."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise ConfigError(
                f"the registry {path} has format {version}, this server knows {len(_MIGRATIONS)}"
            )
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            _transaction(db, partial(_migrate, number=number, script=script))
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, *, number: int, script: str) -> None:
    for statement in filter(str.strip, script.split(";")):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {number}")


def _transaction(db: sqlite3.Connection, run: Callable[[sqlite3.Connection], _T]) -> _T:
    db.execute("BEGIN IMMEDIATE")
    try:
        result = run(db)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return result


def _insert(db: sqlite3.Connection, name: str, row: tuple[object, ...]) -> int:
    """One version more; returns its number."""
    [version] = db.execute(
        "INSERT INTO names VALUES (?, 1) ON CONFLICT (name) DO UPDATE "
        "SET last_version = last_version + 1 RETURNING last_version",
        (name,),
    ).fetchone()
    db.execute("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (name, version, *row))
    return int(version)


def _read(db: sqlite3.Connection) -> dict[str, tuple[AdapterRecord, ...]]:
    names: dict[str, list[AdapterRecord]] = {}
    for name, version, digest, tenant, virtual_tokens, *rest in db.execute(
        "SELECT name, version, digest, tenant, virtual_tokens, family, max_rank, nbytes, created, "
        "source FROM adapters ORDER BY name, version"
    ):
        ref = AdapterRef(name, version, Digest(digest), virtual_tokens)
        names.setdefault(name, []).append(AdapterRecord(ref, TenantId(tenant), *rest))
    return {name: tuple(records) for name, records in names.items()}
