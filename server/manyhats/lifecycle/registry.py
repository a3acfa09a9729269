"""The registry: which names exist, their immutable versions, and the route of each name.

SQLite holds the truth; a snapshot in memory answers every read, so that the way of a request
touches no disk. A change is one transaction together with its entry in the audit log, and returns
once it is on the disk: it survives kill -9. The next read after that sees it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from manyhats.adapters.lock import FileLock
from manyhats.errors import (
    ConfigError,
    ConflictError,
    ModelNotFoundError,
    ServiceError,
)
from manyhats.lifecycle import audit, routes, tables
from manyhats.lifecycle.access import Access, OwnersOnly, check_quota
from manyhats.lifecycle.audit import AuditEntry, Cause
from manyhats.lifecycle.database import open_database, transaction
from manyhats.lifecycle.records import (
    AdapterRecord,
    Entry,
    Registration,
    State,
    check_name,
    held,
    route_json,
)
from manyhats.lifecycle.routes import BASELINE, Route
from manyhats.types import AdapterRef, Composition, Digest, TenantId

_T = TypeVar("_T")


class Registry:
    """Names and versions in the SQLite file ``path``. Thread-safe; reads never block on the disk.

    ``max_versions`` bounds the versions kept in all; ``access`` says who may use what is another
    tenant's (default: nobody). Raises ConfigError where the file is not a registry, is of a newer
    format, or is in use by another process (its snapshot would go stale).
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
            self._db = open_database(path)
            self._entries = tables.read_entries(self._db)
            [self._key] = self._db.execute("SELECT key FROM draw").fetchone()
        except sqlite3.Error as exc:
            self._owner.release()
            raise ConfigError(f"the registry {path} cannot be opened: {exc}") from exc
        except ConfigError:
            self._owner.release()
            raise
        self._generation = 0
        self._uses = Counter(r.ref.digest for e in self._entries.values() for r in e.versions)

    def close(self) -> None:
        """Close the file and give it up to another process."""
        with self._writing:
            self._db.close()
            self._owner.release()

    @property
    def draw_key(self) -> bytes:
        """The key of the hash that draws callers to a canary; the same as long as the file."""
        return bytes(self._key)

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
        composition: Composition | None = None,
        registration: Registration | None = None,
    ) -> AdapterRef:
        """The next version of ``name``, or its newest one where that has the same digest already
        (which changes nothing then, the route neither).

        On the disk when it returns. Raises RequestError (the name), ConflictError (the name is
        another tenant's, or the bound of versions is reached), PermissionDeniedError (the tenant's
        quota), ServiceError (the disk).
        """
        check_name(name)
        told = registration or Registration()
        with self._writing:
            entry = self.entry(name)
            versions = entry.versions if entry else ()
            if versions and versions[-1].tenant != tenant:
                raise ConflictError(f"name {name!r} is taken", param="name")
            if versions and versions[-1].ref.digest == digest:
                return versions[-1].ref
            self._check_room()
            check_quota(self.access, tenant, self._sizes(tenant), nbytes)
            newest = versions[-1].ref.version if versions else BASELINE

            def run(db: sqlite3.Connection) -> Entry:
                version = tables.next_version(db, name)
                ref = AdapterRef(name, version, digest, virtual_tokens, composition)
                record = AdapterRecord(
                    ref,
                    tenant,
                    family,
                    max_rank,
                    nbytes,
                    int(self._clock()),
                    source,
                    actor=told.cause.actor,
                    revision=told.revision,
                    metadata=told.metadata,
                )
                before = entry.route if entry else None
                route = routes.registered(before, ref.version, newest, told.promote)
                tables.insert_version(db, record)
                tables.set_route(db, name, route)
                after = {**record.audited(), "route": route.shown()}
                self._audit(db, told.cause, "register", name, route_json(before), after)
                return Entry((*versions, record), route)

            added = self._write(run)
            self._swap(name, added)
            return added.versions[-1].ref

    def change(
        self, name: str, action: str, cause: Cause, update: Callable[[Entry], Route]
    ) -> Route:
        """Give ``name`` the route that ``update`` makes of what there is; that route.

        Nothing is written where it is the same. Raises ModelNotFoundError (no such name), what
        ``update`` raises, ServiceError (the disk).
        """
        with self._writing:
            entry = self._existing(name)
            route = update(entry)
            if route == entry.route:
                return route

            def run(db: sqlite3.Connection) -> None:
                tables.set_route(db, name, route)
                self._audit(db, cause, action, name, entry.route.shown(), route.shown())

            self._write(run)
            self._swap(name, Entry(entry.versions, route))
            return route

    def set_state(self, name: str, version: int, state: State, cause: Cause) -> None:
        """Retire a version that no request is routed to, or make a retired one ready again.

        Raises ModelNotFoundError, ConflictError (it is routed), ServiceError (the disk).
        """
        with self._writing:
            entry = self._existing(name)
            record = entry.find(version)
            if record is None:
                entry.ready(version)
            if record is None or record.state is state:
                return
            if state is State.RETIRED and entry.route.holds(version):
                raise held(entry, str(record.ref), "retired")
            changed = replace(record, state=state)

            def run(db: sqlite3.Connection) -> None:
                tables.set_state(db, record, state)
                action = "retire" if state is State.RETIRED else "unretire"
                self._audit(db, cause, action, name, record.audited(), changed.audited())

            self._write(run)
            versions = tuple(changed if r is record else r for r in entry.versions)
            self._swap(name, Entry(versions, entry.route))

    def delete(
        self,
        name: str,
        version: int | None = None,
        *,
        force: bool = True,
        cause: Cause | None = None,
    ) -> tuple[AdapterRecord, ...]:
        """Remove and return every version of ``name``, or the one named; its counter stays.

        Unless ``force``, a name with several versions and a version that requests are routed to are
        refused (ConflictError); the stable version always is, as long as there are others. Raises
        ServiceError.
        """
        with self._writing:
            entry = self.entry(name)
            if entry is None:
                return ()
            gone = tuple(r for r in entry.versions if version in (None, r.ref.version))
            kept = tuple(r for r in entry.versions if r not in gone)
            if gone and kept and version is not None:
                routed = entry.route.holds(version)
                if routed and (not force or version == entry.route.stable):
                    raise held(entry, str(gone[0].ref), "deleted")
            elif len(gone) > 1 and not force:
                raise held(
                    entry, f"{name!r} with its {len(gone)} versions", "deleted without force"
                )
            if not gone:
                return ()
            route = routes.without(entry.route, gone[0].ref.version) if kept else None
            if not kept:
                self.access.forget(name)  # first: a death between leaves it private

            def run(db: sqlite3.Connection) -> None:
                for record in gone:
                    tables.delete_version(db, record)
                tables.set_route(db, name, route)
                before = {"versions": [r.audited() for r in gone], "route": entry.route.shown()}
                self._audit(db, cause or Cause(), "delete", name, before, route_json(route))

            self._write(run)
            self._swap(name, Entry(kept, route) if route else None)
            return gone

    def entry(self, name: str) -> Entry | None:
        """The versions of ``name`` and its route, of one moment."""
        with self._reading:
            return self._entries.get(name)

    def list(self, tenant: TenantId) -> list[AdapterRecord]:
        """Every version of each name that the tenant may use, by name, oldest first."""
        return [r for e in self.entries() if self.may_use(e, tenant) for r in e.versions]

    def may_use(self, entry: Entry, tenant: TenantId) -> bool:
        """Whether the tenant may use, and know of, the name."""
        return self.access.may_use(entry.name, entry.owner, tenant)

    def entries(self) -> tuple[Entry, ...]:
        """Every name, sorted."""
        with self._reading:
            found = tuple(self._entries.values())
        return tuple(sorted(found, key=lambda entry: entry.name))

    def scheduled(self) -> tuple[Entry, ...]:
        """The names whose canary has a schedule."""
        with self._reading:
            found = tuple(self._entries.values())
        return tuple(e for e in found if e.route.canary and e.route.canary.schedule)

    def audit(
        self, *, name: str | None = None, after: int = 0, limit: int = 100
    ) -> tuple[AuditEntry, ...]:
        """Entries of the audit log, see ``audit.read``. Blocks on the disk. Raises ServiceError."""
        with self._writing:
            try:
                return audit.read(self._db, name=name, after=after, limit=limit)
            except sqlite3.Error as exc:
                raise ServiceError(f"the registry cannot be read: {exc}") from exc

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
        """The content of every version that the store keeps: compositions have none there."""
        refs = [record.ref for entry in self.entries() for record in entry.versions]
        return {ref.digest for ref in refs if ref.composition is None}

    def _existing(self, name: str) -> Entry:
        entry = self.entry(name)
        if entry is None:
            raise ModelNotFoundError(f"no adapter {name[:140]!r}", param="name")
        return entry

    def _swap(self, name: str, entry: Entry | None) -> None:
        """Make a change visible."""
        with self._reading:
            self._generation += 1
            old = self._entries.pop(name, None)
            if entry is not None:
                self._entries[name] = entry
                self._uses.update(r.ref.digest for r in entry.versions)
            for record in old.versions if old else ():
                self._uses[record.ref.digest] -= 1
                if not self._uses[record.ref.digest]:
                    del self._uses[record.ref.digest]

    def _sizes(self, tenant: TenantId) -> Iterator[int]:
        """Bytes of each version that is the tenant's own."""
        owned = (e for e in self._entries.values() if e.owner == tenant)
        return (record.nbytes for entry in owned for record in entry.versions)

    def _check_room(self) -> None:
        """Raises ConflictError where no further version may be added."""
        with self._reading:
            count = self._uses.total()
        if count >= self._max_versions:
            raise ConflictError(
                f"{count} adapter versions are registered, the bound is {self._max_versions} "
                "(max_adapters); delete some first"
            )

    def _audit(
        self,
        db: sqlite3.Connection,
        cause: Cause,
        action: str,
        name: str,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
    ) -> None:
        at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        audit.append(db, at=at, cause=cause, action=action, name=name, before=before, after=after)

    def _write(self, run: Callable[[sqlite3.Connection], _T]) -> _T:
        """``run`` in one transaction: all of it is on the disk afterwards, or none."""
        try:
            return transaction(self._db, run)
        except sqlite3.Error as exc:
            raise ServiceError(f"the registry cannot be written: {exc}") from exc
