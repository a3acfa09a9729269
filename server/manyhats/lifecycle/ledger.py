"""How a change gets into the registry's store, and what others have written into the snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from manyhats.errors import ServiceError
from manyhats.lifecycle import audit
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.documents import NameDocument, decode, encode
from manyhats.lifecycle.records import Entry
from manyhats.lifecycle.snapshot import Difference, Snapshot
from manyhats.lifecycle.store import Documents, Head, RegistryStore, StaleHeadError, Texts

_TRIES: Final = 50
_ENTRIES_AT_ONCE: Final = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one name: ``entry`` None removes it. ``before`` and ``after`` are audited;
    ``texts`` change with it.

    ``name`` empty: of none, an entry in the log alone.
    """

    action: str
    name: str
    entry: Entry | None
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    texts: Texts = field(default_factory=dict)


class Ledger:
    """A store and the ``snapshot`` of it. Thread-safe; ``lock`` keeps several calls together.

    ``follower`` is told, while ``lock`` is held, what others have changed. Raises ServiceError.
    """

    def __init__(self, store: RegistryStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self.lock = threading.RLock()
        self.snapshot = Snapshot()
        self.follower: Callable[[Difference], None] | None = None
        self._load()

    def commit(self, cause: Cause, plan: Callable[[], Change | None]) -> None:
        """Write what ``plan`` makes of the newest state; it is made anew where somebody was faster.

        None: there is nothing to write. Raises what ``plan`` raises, and ServiceError.
        """
        with self.lock:
            for _ in range(_TRIES):
                self.refresh()
                change = plan()
                if change is None or self._written(cause, change):
                    return
                self._refresh()
        raise ServiceError("the registry is being changed by too many at once; try again")

    def _written(self, cause: Cause, change: Change) -> bool:
        """False where somebody else has written since this snapshot."""
        head = self.snapshot.head
        entry = audit.following(
            (head.seq, head.hash),
            at=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            cause=cause,
            action=change.action,
            name=change.name,
            before=change.before,
            after=change.after,
        )
        documents: dict[str, NameDocument] = {}
        if change.name:
            documents[change.name] = self.snapshot.document(change.name).holding(change.entry)
        try:
            encoded = {name: encode(document) for name, document in documents.items()}
            self._store.write(entry, encoded, change.texts)
        except StaleHeadError:
            return False
        self.snapshot.update(Head.of(entry), documents)
        return True

    def refresh(self) -> None:
        """Take over what others have written. Raises ServiceError."""
        if self._store.shared:
            self._refresh()

    def _refresh(self) -> None:
        with self.lock:
            head = self._store.head()
            if head == self.snapshot.head:
                return
            names = self._changed_names(head)
            if names is None:
                difference = self._load()
            else:
                head, documents = self._store.read_names(names)
                if not self._covers(head, names):
                    difference = self._load()
                else:
                    difference = self.snapshot.update(head, _decoded(documents))
            if self.follower is not None and (difference.added or difference.gone):
                self.follower(difference)

    def _changed_names(self, head: Head) -> list[str] | None:
        """The names that changed since this snapshot; None where it is no part of the log's past,
        or so many did that reading everything is quicker.
        """
        known = self.snapshot.head
        if head.seq <= known.seq:
            return None
        entries = self._store.audit(name=None, after=known.seq, limit=_ENTRIES_AT_ONCE)
        follows = bool(entries) and entries[0].previous == known.hash
        complete = bool(entries) and entries[-1].seq >= head.seq
        return sorted({e.name for e in entries if e.name}) if follows and complete else None

    def _covers(self, head: Head, names: list[str]) -> bool:
        """Whether no other name has changed up to ``head``, which may be newer than was looked."""
        again = self._changed_names(head)
        return again is not None and set(again) <= set(names)

    def _load(self) -> Difference:
        head, documents = self._store.read()
        return self.snapshot.replace(head, _decoded(documents))


def _decoded(documents: Documents) -> dict[str, NameDocument]:
    return {name: decode(name, text) for name, text in documents.items()}
