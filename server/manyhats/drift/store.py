"""What drift detection keeps: one protocol, embedded (SQLite) or shared by replicas (Redis).

Texts by key, all JSON: ``reference/<digest>/<replica>`` and ``frozen/<digest>`` (sketches),
``window/<digest>/<replica>`` (the latest windows, to be shown merged), ``spent/<digest>``,
``policy/<name>``, ``latch/<name>``, ``alarms/<name>``, ``validation/<name>``. A version goes by the
digest of its content: replicas need not number their versions alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


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
