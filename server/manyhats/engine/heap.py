"""The C library's heap."""

from __future__ import annotations

import ctypes
import sys
import threading


def give_back() -> bool:
    """Returns to the system what the heap holds free, in the middle too; what loading and compiling
    left behind stays otherwise. False where the C library cannot (``malloc_trim`` is glibc's).
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
    if trim is None:
        return False
    trim(ctypes.c_size_t(0))
    return True


class Trimmer:
    """Gives free memory back whenever ``every`` bytes were loaded and may have left some behind.

    Thread-safe. Takes milliseconds then, during which others wait that allocate: so not each time.
    """

    def __init__(self, every: int = 32 << 20) -> None:
        self._every = every
        self._lock = threading.Lock()
        self._bytes = 0

    def loaded(self, nbytes: int) -> None:
        """So many bytes were loaded, and what loading them took is free again."""
        with self._lock:
            self._bytes += nbytes
            due = self._bytes >= self._every
            if due:
                self._bytes = 0
        if due:
            give_back()
