"""Removing bytes: of versions that are deleted, of those retired long ago, of what a death left.

Bytes go only while no process is between a commit to the store and its entry in the registry
(``AdapterStore.removing``), and after the registry was read anew: what another replica has just
registered stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from manyhats.adapters.store import AdapterStore
from manyhats.errors import ConflictError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.records import AdapterRecord, Entry
from manyhats.lifecycle.registry import Registry
from manyhats.types import AdapterRef, Digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """How long bytes stay that no request can be routed to, in seconds.

    ``retired_s`` after a version was retired (None: for ever), ``deleted_s`` after it was deleted.
    """

    retired_s: float | None = None
    deleted_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed, or would be: retired versions, and how many bytes of how many digests."""

    versions: tuple[AdapterRef, ...] = ()
    digests: tuple[Digest, ...] = ()
    nbytes: int = 0


class Collector:
    """Thread-safe; every call blocks on the disk and the registry's store. Raises ServiceError.

    ``leased`` gives the digests that running requests hold. ``drop`` is told of each version that
    is collected, ``freed`` what a collection came to. All three may be set later.
    """

    def __init__(
        self,
        store: AdapterStore,
        registry: Registry,
        retention: Retention,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._registry = registry
        self._retention = retention
        self._clock = clock
        self.leased: Callable[[], Iterable[Digest]] = tuple
        self.drop: Callable[[AdapterRef], None] | None = None
        self.freed: Callable[[Collected], None] | None = None

    def sweep(self) -> None:
        """At a start: remove what a death left, and say what is missing."""
        self._store.claim(self._registry.identity)
        with self._store.removing():
            self._registry.refresh()
            kept, known = set(self._store.list()), self._registry.digests()
            for digest in self._removable(kept - known):
                self._store.delete(digest)
                logger.info("removed %s from the store: no version refers to it", digest)
        for digest in known - kept:
            logger.error("adapter version %s is registered, its bytes are missing", digest)

    def discard(self, digests: Iterable[Digest]) -> None:
        """Remove the bytes of those that no version refers to; or, with ``deleted_s``, let that
        time begin: a later ``collect`` removes them.
        """
        with self._store.removing():
            self._registry.refresh()
            for digest in digests:
                if self._registry.uses(digest):
                    continue
                if self._retention.deleted_s:
                    self._store.touch(digest)
                else:
                    self._store.delete(digest)

    def collect(self, cause: Cause, *, dry_run: bool = False) -> Collected:
        """Delete the versions retired long enough ago, and all bytes that nothing refers to.

        Never a version that a route holds, a running request has, or a composition is made of, nor
        the last one of a name. Each is an entry of the audit log, and so is the sum.
        """
        self._registry.refresh()
        due = self._due()
        versions = due if dry_run else [r for r in due if self._delete(r, cause)]
        doomed = {r.ref.digest for r in versions if r.ref.composition is None}
        with self._store.removing():
            self._registry.refresh()
            going = {r.ref for r in versions}
            used = {
                r.ref.digest
                for e in self._registry.entries()
                for r in e.versions
                if r.ref not in going
            }
            orphans = set(self._store.list()) - used
            removable = sorted({*self._removable(orphans), *(doomed & orphans)})
            nbytes = sum(self._store.size(digest) for digest in removable)
            if not dry_run:
                for digest in removable:
                    self._store.delete(digest)
                self._store.tidy(self._clock())
        found = Collected(tuple(r.ref for r in versions), tuple(removable), nbytes)
        if not dry_run and (found.versions or found.digests):
            self._tell(found, cause)
        return found

    def _tell(self, found: Collected, cause: Cause) -> None:
        told = {
            "versions": [str(ref) for ref in found.versions],
            "digests": list(found.digests),
            "bytes": found.nbytes,
        }
        self._registry.note("gc", cause, told)
        if self.freed is not None:
            self.freed(found)
        logger.info(
            "collected %d versions, %d bytes of %d digests",
            len(found.versions),
            found.nbytes,
            len(found.digests),
        )

    def _due(self) -> list[AdapterRecord]:
        if self._retention.retired_s is None:
            return []
        before = self._clock() - self._retention.retired_s
        entries, leased = self._registry.entries(), set(self.leased())
        members = {
            (member.name, member.version)
            for entry in entries
            for record in entry.versions
            for member in (record.ref.composition.members if record.ref.composition else ())
        }
        return [
            record
            for entry in entries
            for record in _retired(entry)
            if (record.since or record.created) <= before
            and record.ref.digest not in leased
            and (record.ref.name, record.ref.version) not in members
        ]

    def _delete(self, record: AdapterRecord, cause: Cause) -> bool:
        """False where somebody has put it to use meanwhile."""
        ref = record.ref
        try:
            gone = self._registry.delete(
                ref.name, ref.version, force=False, cause=cause, action="collect", only=_is_retired
            )
        except ConflictError as error:
            logger.info("%s is not collected: %s", ref, error.message)
            return False
        if gone and self.drop is not None and not self._registry.uses(ref.digest):
            self.drop(ref)
        return bool(gone)

    def _removable(self, orphans: Iterable[Digest]) -> list[Digest]:
        now, kept_s = self._clock(), self._retention.deleted_s
        return [d for d in orphans if not kept_s or self._store.age_s(d, now) >= kept_s]


def _is_retired(record: AdapterRecord) -> bool:
    return record.retired


def _retired(entry: Entry) -> list[AdapterRecord]:
    """Its retired versions that no route holds; without the newest where all are."""
    found = [r for r in entry.versions if _is_retired(r) and not entry.route.holds(r.ref.version)]
    return found[:-1] if len(found) == len(entry.versions) else found
