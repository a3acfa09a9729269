"""The registry: which names exist, their immutable versions, and the route of each name.

A store holds the truth (``store.py``: SQLite, or Redis for replicas); a snapshot in memory answers
every read, so that the way of a request touches neither disk nor network. A change is one
transaction together with its entry in the audit log, and returns once the store has it: it survives
kill -9. The next read after that sees it; on other replicas one as soon as they are told.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from manyhats.errors import ConfigError, ConflictError, ModelNotFoundError, ServiceError
from manyhats.lifecycle import routes
from manyhats.lifecycle.access import Access, OwnersOnly, check_quota
from manyhats.lifecycle.audit import AuditEntry, Cause
from manyhats.lifecycle.checks import check_members, check_no_member, check_removable, held
from manyhats.lifecycle.ledger import Change, Ledger
from manyhats.lifecycle.records import (
    AdapterRecord,
    Entry,
    Registration,
    check_name,
    route_json,
)
from manyhats.lifecycle.routes import BASELINE, Route
from manyhats.lifecycle.snapshot import Difference
from manyhats.lifecycle.states import Demands
from manyhats.lifecycle.store import RegistryStore, Texts
from manyhats.lifecycle.store_sqlite import SqliteRegistryStore
from manyhats.lifecycle.texts import digests, text_key, texts_of
from manyhats.types import AdapterRef, Composition, Digest, TenantId


class Registry:
    """Names and versions in ``store``; a path is that of a SQLite file, opened for this process
    alone. Thread-safe; reads never block on the store.

    ``max_versions`` bounds the versions kept in all; ``access`` says who may use what is another
    tenant's (default: nobody); ``base_digest`` is kept with each version. Raises ConfigError where
    there is no registry to read (see the stores).
    """

    def __init__(
        self,
        store: RegistryStore | Path,
        *,
        max_versions: int,
        clock: Callable[[], float] = time.time,
        access: Access | None = None,
        base_digest: str = "",
    ) -> None:
        self._store = SqliteRegistryStore(store) if isinstance(store, Path) else store
        self._max_versions = max_versions
        self._clock = clock
        self.access: Access = access or OwnersOnly()
        self._base_digest = base_digest
        try:
            self._ledger = Ledger(self._store, clock)
        except ServiceError as exc:
            self._store.close()
            raise ConfigError(f"the registry cannot be opened: {exc.message}") from exc
        self._snapshot = self._ledger.snapshot

    def close(self) -> None:
        """Give up the store, a file to another process."""
        with self._ledger.lock:
            self._store.close()

    @property
    def store(self) -> RegistryStore:
        """What it is kept in."""
        return self._store

    @property
    def revision(self) -> int:
        """The number of changes that the snapshot holds."""
        return self._snapshot.head.seq

    def follow(self, follower: Callable[[Difference], None]) -> None:
        """From now on ``follower`` is told what others change in a shared store; see ``Ledger``."""
        self._ledger.follower = follower

    @property
    def identity(self) -> str:
        """What the registry is known by; nobody draws a key from it."""
        return hashlib.sha256(self._store.key).hexdigest()

    @property
    def draw_key(self) -> bytes:
        """The key of the hash that draws callers to a canary; the same as long as the store."""
        return self._store.key

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

        In the store when it returns. Raises RequestError (the name), ConflictError (the name is
        another tenant's, a member is gone, or the bound of versions is reached),
        PermissionDeniedError (the tenant's quota), ServiceError (the store).
        """
        check_name(name)
        told = registration or Registration()

        def plan() -> Change | None:
            entry, last = self.entry(name), self._snapshot.document(name).last_version
            versions = entry.versions if entry else ()
            if versions and versions[-1].tenant != tenant:
                raise ConflictError(f"name {name!r} is taken", param="name")
            if versions and versions[-1].ref.digest == digest:
                return None
            self._check_room()
            check_members(composition, self.entry)
            check_quota(self.access, tenant, self._snapshot.sizes(tenant), nbytes)
            record = AdapterRecord(
                AdapterRef(name, last + 1, digest, virtual_tokens, composition),
                tenant,
                family,
                max_rank,
                nbytes,
                int(self._clock()),
                source,
                actor=told.cause.actor,
                revision=told.revision,
                metadata=told.metadata,
                base_digest=self._base_digest,
            )
            newest = versions[-1].ref.version if versions else BASELINE
            before = entry.route if entry else None
            route = routes.registered(before, last + 1, newest, told.promote)
            after = {**record.audited(), "route": route.shown()}
            kept = (*versions, record)
            entry = entry or Entry(kept, route, began=self.revision + 1)
            added = replace(entry, versions=kept, route=route)
            return Change("register", name, added, route_json(before), after)

        with self._ledger.lock:
            self._ledger.commit(told.cause, plan)
            return self._existing(name).versions[-1].ref

    def change(
        self, name: str, action: str, cause: Cause, update: Callable[[Entry], Route]
    ) -> Route:
        """Give ``name`` the route that ``update`` makes of what there is; that route.

        Nothing is written where it is the same. ``update`` is called again where another replica
        was faster. Raises ModelNotFoundError (no such name), what ``update`` raises, ServiceError.
        """

        def plan(entry: Entry) -> Change:
            after = replace(entry, route=update(entry))
            return Change(action, name, after, entry.route.shown(), after.route.shown())

        return self._changed(name, cause, plan).route

    def change_demands(
        self, name: str, cause: Cause, update: Callable[[Demands], Demands], texts: Texts
    ) -> Entry:
        """Change what a name demands of its versions, and the texts that they are evaluated on, of
        which the log has the digests. Raises as ``change`` does.
        """

        def plan(entry: Entry) -> Change:
            after = replace(entry, demands=update(entry.demands))
            told = {**after.demands.shown(), **digests(texts)}
            return Change("gate", name, after, entry.demands.shown(), told, texts)

        return self._changed(name, cause, plan)

    def change_version(
        self,
        name: str,
        version: int,
        action: str,
        cause: Cause,
        update: Callable[[Entry, AdapterRecord], AdapterRecord],
        texts: Texts | None = None,
    ) -> AdapterRecord:
        """Put what ``update`` makes of a version in its place, as ``change`` does for a route.

        The log has what ``AdapterRecord.audited`` gives before and after. Raises
        ModelNotFoundError, what ``update`` raises, ServiceError.
        """

        def plan(entry: Entry) -> Change:
            record = entry.get(version)
            changed = update(entry, record)
            versions = tuple(changed if r is record else r for r in entry.versions)
            after = replace(entry, versions=versions)
            told = (record.audited(), changed.audited())
            return Change(action, name, after, *told, texts or {})

        return self._changed(name, cause, plan).get(version)

    def retire(self, name: str, version: int, cause: Cause, *, retired: bool) -> None:
        """Take a version that no request is routed to out of use, or bring it back.

        Raises ModelNotFoundError, ConflictError (it is routed), ServiceError.
        """

        def update(entry: Entry, record: AdapterRecord) -> AdapterRecord:
            if retired and not record.retired and entry.route.holds(version):
                raise held(entry, str(record.ref), "retired")
            return record.retiring(retired, self._clock())

        self.change_version(name, version, "retire" if retired else "unretire", cause, update)

    def _changed(self, name: str, cause: Cause, plan: Callable[[Entry], Change]) -> Entry:
        """The name once what ``plan`` makes of it is written, unless that changes nothing."""

        def anew() -> Change | None:
            entry = self._existing(name)
            change = plan(entry)
            return change if change.entry != entry or change.texts else None

        with self._ledger.lock:
            self._ledger.commit(cause, anew)
            return self._existing(name)

    def delete(
        self,
        name: str,
        version: int | None = None,
        *,
        force: bool = True,
        cause: Cause | None = None,
        action: str = "delete",
        only: Callable[[AdapterRecord], bool] = lambda record: True,
    ) -> tuple[AdapterRecord, ...]:
        """Remove and return every version of ``name``, or the one named, for which ``only`` holds;
        its counter stays.

        Unless ``force``, a name with several versions and a version that requests are routed to are
        refused (ConflictError); the stable version always is, as long as there are others. Raises
        ServiceError.
        """
        removed: list[AdapterRecord] = []

        def plan() -> Change | None:
            entry = self.entry(name)
            removed[:] = [
                r
                for r in (entry.versions if entry else ())
                if version in (None, r.ref.version) and only(r)
            ]
            if entry is None or not removed:
                return None
            kept = tuple(r for r in entry.versions if r not in removed)
            check_no_member(self._snapshot.entries(), name, version)
            check_removable(entry, removed, kept, version, force=force)
            route = routes.without(entry.route, removed[0].ref.version) if kept else None
            if not kept:
                self.access.forget(name)  # first: a death between leaves it private
            before = {"versions": [r.audited() for r in removed], "route": entry.route.shown()}
            after = replace(entry, versions=kept, route=route) if route else None
            texts = dict.fromkeys(texts_of(name, removed, whole=not kept))
            return Change(action, name, after, before, route_json(route), texts)

        with self._ledger.lock:
            self._ledger.commit(cause or Cause(), plan)
        return tuple(removed)

    def text(self, name: str, what: str | int) -> str | None:
        """A text kept with a name or a version (``store.text_key``). Raises ServiceError."""
        return self._store.text(text_key(name, what))

    def note(self, action: str, cause: Cause, told: Mapping[str, Any]) -> None:
        """An entry in the audit log of what concerns no name. Raises ServiceError."""
        with self._ledger.lock:
            self._ledger.commit(cause, lambda: Change(action, "", None, {}, told))

    def entry(self, name: str) -> Entry | None:
        """The versions of ``name`` and its route, of one moment."""
        return self._snapshot.entry(name)

    def list(self, tenant: TenantId) -> list[AdapterRecord]:
        """Every version of each name that the tenant may use, by name, oldest first."""
        return [r for e in self.entries() if self.may_use(e, tenant) for r in e.versions]

    def may_use(self, entry: Entry, tenant: TenantId) -> bool:
        """Whether the tenant may use, and know of, the name."""
        return self.access.may_use(entry.name, entry.owner, tenant)

    def entries(self) -> tuple[Entry, ...]:
        """Every name, sorted."""
        return tuple(sorted(self._snapshot.entries(), key=lambda entry: entry.name))

    def scheduled(self) -> tuple[Entry, ...]:
        """The names whose canary has a schedule."""
        found = self._snapshot.entries()
        return tuple(e for e in found if e.route.canary and e.route.canary.schedule)

    def audit(
        self, *, name: str | None = None, after: int = 0, limit: int = 100
    ) -> tuple[AuditEntry, ...]:
        """Entries of the audit log (``audit.read``). Blocks on the store; raises ServiceError."""
        return tuple(self._store.audit(name=name, after=after, limit=limit))

    @property
    def generation(self) -> int:
        """Grows with every change."""
        return self._snapshot.generation

    def uses(self, digest: Digest) -> int:
        """How many versions have this content."""
        return self._snapshot.uses(digest)

    def digests(self) -> set[Digest]:
        """The content of every version that the store keeps: compositions have none there."""
        refs = [r.ref for entry in self._snapshot.entries() for r in entry.versions]
        return {ref.digest for ref in refs if ref.composition is None}

    def refresh(self) -> None:
        """Take over what others have written to a shared store. Raises ServiceError."""
        self._ledger.refresh()

    def _existing(self, name: str) -> Entry:
        entry = self.entry(name)
        if entry is None:
            raise ModelNotFoundError(f"no adapter {name[:140]!r}", param="name")
        return entry

    def _check_room(self) -> None:
        """Raises ConflictError where no further version may be added."""
        count = self._snapshot.versions()
        if count >= self._max_versions:
            raise ConflictError(
                f"{count} adapter versions are registered, the bound is {self._max_versions} "
                "(max_adapters); delete some first"
            )
