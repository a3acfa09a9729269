"""The C library's heap."""

from __future__ import annotations

import ctypes
import sys


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
