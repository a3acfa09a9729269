"""What the registry is kept in: one protocol, embedded (SQLite) or shared by replicas (Redis).

A store holds one JSON document a name (``documents.py``), texts that are too long for these (what
an adapter is evaluated on, reports), the audit log, and the key that draws callers to a canary.
Each write is one transaction of a few documents and texts and exactly one entry of the audit log,
which must follow the newest one. So the log's end is the registry's revision: who has
seen entry n knows every change up to it, and reads no more than the names of the entries after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from manyhats.lifecycle.audit import GENESIS, AuditEntry

Documents = Mapping[str, str]
"""JSON texts by name."""

Texts = Mapping[str, str | None]
"""Long texts to be kept by key (``texts.py``); None: to be removed."""


@dataclass(frozen=True, slots=True)
class Head:
    """The end of the audit log: the newest entry's number and hash; of an empty one (0, GENESIS).

    Two stores with the same head hold the same registry.
    """

    seq: int = 0
    hash: str = GENESIS

    @classmethod
    def of(cls, entry: AuditEntry) -> Head:
        """The head once ``entry`` is the newest."""
        return cls(entry.seq, entry.hash)


@dataclass(frozen=True, slots=True)
class Dump:
    """All of a store: what a backup keeps of it. ``entries``: the whole log, oldest first."""

    key: bytes
    documents: Documents
    entries: Sequence[AuditEntry]
    texts: Mapping[str, str] = field(default_factory=dict)


class StaleHeadError(Exception):
    """Somebody else has written since the head that a change was made from."""


class RegistryStore(Protocol):
    """One registry's documents and log. Thread-safe.

    Every call but ``key`` may block on a disk or a network and raises ServiceError where that
    fails. After a failed write it is open whether it happened: read, or write the same again.
    """

    @property
    def shared(self) -> bool:
        """Whether others write to it too, so that a snapshot must be kept fresh."""

    @property
    def key(self) -> bytes:
        """32 random bytes, made with the store: what its registry is known by."""

    def head(self) -> Head:
        """The end of the log."""

    def read(self) -> tuple[Head, Documents]:
        """Every document, and the head that they are of."""

    def read_names(self, names: Sequence[str]) -> tuple[Head, Documents]:
        """The documents of these names, where there are any, and the head that they are of."""

    def text(self, key: str) -> str | None:
        """The text of this key, if there is one."""

    def write(self, entry: AuditEntry, documents: Documents, texts: Texts | None = None) -> None:
        """Set these documents and texts and append ``entry``: all of it, or nothing.

        Raises StaleHeadError unless ``entry`` follows the log's end. The same write a second time
        changes nothing.
        """

    def audit(self, *, name: str | None, after: int, limit: int) -> Sequence[AuditEntry]:
        """At most ``limit`` entries beyond number ``after``, oldest first; of one name if given."""

    def wait(self, timeout_s: float) -> None:
        """Until somebody may have written, or ``timeout_s`` seconds have passed."""

    def dump(self) -> Dump:
        """All of it, as of one moment."""

    def load(self, dump: Dump) -> None:
        """Put ``dump`` in the place of all that is there, in one transaction."""

    def close(self) -> None:
        """Give up the file or the connections."""
