"""How far a fetch is, told by the thread that fetches, read by others."""

from __future__ import annotations

import threading


class CancelledFetchError(Exception):
    """Somebody wants the fetch no longer."""


class Progress:
    """Bytes of a fetch. Thread-safe: plain numbers, one writer."""

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None
        self._cancelled = threading.Event()

    def expect(self, size: int) -> None:
        """``size`` more bytes are to come."""
        self.total = (self.total or 0) + size

    def add(self, size: int) -> None:
        """``size`` bytes are there. Raises CancelledFetchError."""
        self.done += size
        self.check()

    def check(self) -> None:
        """Raises CancelledFetchError once ``cancel`` was called."""
        if self._cancelled.is_set():
            raise CancelledFetchError

    def cancel(self) -> None:
        """End the fetch at its next bytes."""
        self._cancelled.set()
