"""What drift detection keeps: one protocol, embedded (SQLite) or shared by replicas (Redis).

Texts by key, all JSON. Of a version, ``watch.ident``: ``reference/<version>/<replica>`` (what is
being collected), ``window/<version>/<replica>``, ``frozen/<version>/<signal>``,
``hidden/<version>``, ``evaluation/<version>``, ``spent/<version>``. Of a name, ``scope``:
``policy/``, ``latch/``, ``alarms/`` and ``validation/<owner>/<name>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from manyhats.lifecycle.records import Entry


def scope(entry: Entry) -> str:
    """``owner/name``: whoever gets a name that was another tenant's before finds nothing of it."""
    return f"{entry.owner}/{entry.name}"


class DriftStore(Protocol):
    """Texts by key. Thread-safe; every call may block and raises ServiceError where that fails."""

    def get(self, key: str) -> str | None:
        """The text of ``key``."""

    def put(self, key: str, text: str) -> None:
        """Set it. On the disk when it returns."""

    def put_new(self, key: str, text: str) -> str:
        """Set it unless it is set; what it is then. One of several who call this at once wins."""

    def items(self, prefix: str) -> Mapping[str, str]:
        """Every key that begins with ``prefix``, and its text."""

    def remove(self, key: str) -> None:
        """Remove it, if it is there."""

    def close(self) -> None:
        """Give up the file or the connections."""
