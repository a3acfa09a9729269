"""What one server knows of the registry: all of it in memory, and what a change makes of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from manyhats.lifecycle.documents import NameDocument
from manyhats.lifecycle.records import Entry
from manyhats.lifecycle.store import Head
from manyhats.types import AdapterRef, Digest, TenantId


@dataclass(frozen=True, slots=True)
class Difference:
    """What came and went between two heads, by content: one version of each digest that no version
    had before, and of each that none has any more.
    """

    added: tuple[AdapterRef, ...] = ()
    gone: tuple[AdapterRef, ...] = ()


class Snapshot:
    """Every name's document, of one head. Thread-safe; nothing blocks but on another look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._head = Head()
        self._documents: dict[str, NameDocument] = {}
        self._entries: dict[str, Entry] = {}
        self._uses: Counter[Digest] = Counter()
        self._generation = 0

    @property
    def head(self) -> Head:
        """The end of the audit log that this is as of."""
        with self._lock:
            return self._head

    @property
    def generation(self) -> int:
        """Grows with every change."""
        with self._lock:
            return self._generation

    def document(self, name: str) -> NameDocument:
        """A name's document; an empty one where there is none."""
        with self._lock:
            return self._documents.get(name) or NameDocument()

    def entry(self, name: str) -> Entry | None:
        """The versions of ``name`` and its route, of one moment."""
        with self._lock:
            return self._entries.get(name)

    def entries(self) -> tuple[Entry, ...]:
        """Every name that has a version, in no order."""
        with self._lock:
            return tuple(self._entries.values())

    def uses(self, digest: Digest) -> int:
        """How many versions have this content."""
        with self._lock:
            return self._uses[digest]

    def versions(self) -> int:
        """How many versions there are."""
        with self._lock:
            return self._uses.total()

    def sizes(self, tenant: TenantId) -> Iterator[int]:
        """Bytes of each version that is the tenant's own."""
        owned = (entry for entry in self.entries() if entry.owner == tenant)
        return (record.nbytes for entry in owned for record in entry.versions)

    def replace(self, head: Head, documents: Mapping[str, NameDocument]) -> Difference:
        """Take over everything; what is not in ``documents`` is gone."""
        with self._lock:
            lost = self._documents.keys() - documents.keys()
            return self._take(head, {**dict.fromkeys(lost, NameDocument()), **documents})

    def update(self, head: Head, documents: Mapping[str, NameDocument]) -> Difference:
        """Take over what has changed up to ``head``; visible all at once."""
        with self._lock:
            return self._take(head, documents)

    def _take(self, head: Head, documents: Mapping[str, NameDocument]) -> Difference:
        before: dict[Digest, AdapterRef] = {}
        after: dict[Digest, AdapterRef] = {}
        known = Counter(self._uses)
        for name, document in documents.items():
            old = self._entries.pop(name, None)
            self._documents[name] = document
            entry = document.entry
            if entry is not None:
                self._entries[name] = entry
            self._count(_refs(old), before, -1)
            self._count(_refs(entry), after, 1)
        self._head = head
        self._generation += 1
        added = tuple(r for d, r in after.items() if not known[d])
        gone = tuple(r for d, r in before.items() if known[d] and d not in self._uses)
        return Difference(added, gone)

    def _count(self, refs: Iterable[AdapterRef], seen: dict[Digest, AdapterRef], step: int) -> None:
        for ref in refs:
            seen[ref.digest] = ref
            self._uses[ref.digest] += step
            if not self._uses[ref.digest]:
                del self._uses[ref.digest]


def _refs(entry: Entry | None) -> Iterator[AdapterRef]:
    return (record.ref for record in entry.versions) if entry else iter(())
