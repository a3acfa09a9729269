"""Waiting for what can only be seen from outside."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 120.0
"""How long anything may take on a slow machine before a test calls it lost."""


def until(
    condition: Callable[[], object],
    timeout: float = PATIENCE_S,
    told: Callable[[], object] = lambda: "",
) -> float:
    """Polls until ``condition`` holds, and gives the seconds that it took; fails with ``told()``
    where it does not in time.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout, f"it did not happen: {told()}"
        time.sleep(0.02)
    return time.monotonic() - began
