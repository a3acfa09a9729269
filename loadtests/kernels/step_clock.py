"""When an engine delivers: the time between two deliveries is a step."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from manyhats.types import OutputDelta


class Clock:
    """When each delivery came, and how many requests have ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: BaseException | None = None
        self._ended = 0
        self._wanted = 0
        self._done = threading.Event()

    def expect(self, requests: int) -> None:
        """Begins anew."""
        self.times, self._ended, self._wanted = [], 0, requests
        self._done.clear()

    def deliver(self, deltas: Sequence[OutputDelta]) -> None:
        """The engine's deliveries; called on its step thread."""
        self.times.append(time.perf_counter())
        for delta in deltas:
            self.error = delta.error or self.error
            self._ended += delta.finish_reason is not None or delta.error is not None
        if self._ended >= self._wanted:
            self._done.set()

    def wait(self) -> None:
        """Until all have ended. Raises the first request's error, if there was one."""
        self._done.wait()
        if self.error is not None:
            raise self.error

    def steps(self) -> list[float]:
        """Seconds of each step, sorted. The requests start and end within some steps of each other:
        only the middle half of the steps, which have all of them, is counted.
        """
        quarter = len(self.times) // 4
        middle = self.times[quarter : len(self.times) - quarter]
        return sorted(b - a for a, b in itertools.pairwise(middle))
