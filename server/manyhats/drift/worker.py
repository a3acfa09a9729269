"""A thread that does small pieces of work in turn, out of a bounded queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from manyhats.errors import ManyhatsError

logger = logging.getLogger(__name__)

Work = Callable[[], None]


class Worker:
    """Holds ``lock`` around each piece of work. ``tick`` is done between others every ``tick_s`` by
    ``clock``, or when nothing comes for as long; ``dropped`` is told why something was not done.
    """

    def __init__(
        self,
        lock: threading.RLock,
        tick: Work,
        dropped: Callable[[str], None],
        *,
        size: int,
        tick_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._lock = lock
        self._tick = tick
        self._dropped = dropped
        self._tick_s = tick_s
        self._clock = clock
        self._ticked_at = clock()
        self._queue: queue.Queue[Work | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, last: Work) -> None:
        """Do what waits, then ``last``, and end."""
        if self._thread.is_alive():
            self._queue.put(last)
            self._queue.put(None)
            self._thread.join()

    def post(self, work: Work) -> None:
        """Queue one piece of work; where there is no room it is dropped. Never blocks."""
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._dropped("queue")

    def settle(self) -> None:
        """Wait until all that was posted is done, and a tick after it."""
        done = threading.Event()
        self._queue.put(self._tick)
        self._queue.put(done.set)
        done.wait()

    def _run(self) -> None:
        while True:
            try:
                work = self._queue.get(timeout=self._tick_s)
            except queue.Empty:
                work = self._tick
            if work is None:
                return
            self._guarded(work)
            if self._clock() >= self._ticked_at + self._tick_s:
                self._ticked_at = self._clock()
                self._guarded(self._tick)

    def _guarded(self, work: Work) -> None:
        """One request that cannot be looked at must not end the looking."""
        try:
            with self._lock:
                work()
        except ManyhatsError as error:
            self._dropped("failed")
            logger.error("drift: %s", error.message)
        except Exception:
            self._dropped("failed")
            logger.exception("drift detection failed")
