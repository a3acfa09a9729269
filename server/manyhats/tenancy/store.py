"""What the records of tenancy are kept in: one protocol, embedded (SQLite) or shared (Redis)."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Kind(enum.StrEnum):
    """The kinds of records; an id is unique within its kind."""

    TENANT = "tenant"
    KEY = "key"
    GRANT = "grant"


Texts = Mapping[Kind, Mapping[str, str]]
"""JSON texts by kind and id."""


@dataclass(frozen=True, slots=True)
class Change:
    """One record is set to ``text``, or removed where that is None."""

    kind: Kind
    id: str
    text: str | None


class StaleRevisionError(Exception):
    """Somebody else has written since the revision that a change was made from."""


class TenantStore(Protocol):
    """Records under one revision number that grows with every write. Thread-safe.

    Every call may block on a disk or a network and raises ServiceError where that fails.
    """

    def revision(self) -> int:
        """The number of the latest write, 0 before the first."""

    def read(self) -> tuple[int, Texts]:
        """The revision and every record as of it."""

    def write(self, revision: int, changes: Sequence[Change]) -> int:
        """Make all changes, or none; returns the new revision. On the disk when it returns.

        Raises StaleRevisionError unless ``revision`` is the store's.
        """

    def close(self) -> None:
        """Give up the file or the connections."""
