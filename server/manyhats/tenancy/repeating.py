"""Work done again and again beside everything else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(work: Callable[[], None], period_s: float, name: str) -> Iterator[None]:
    """Calls ``work`` every ``period_s`` on a thread of its own until the block ends.

    ``work`` raises nothing. The block's end waits for a call that runs.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(period_s):
            work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
