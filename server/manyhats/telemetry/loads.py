"""Which adapters were loaded lately, and how long that took: for the spans of who waited."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from manyhats.engine.interface import EngineObserver

_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Load:
    """One adapter on its way to ``tier``; seconds of the monotonic clock."""

    adapter: str
    tier: str
    start: float
    end: float


class LoadLog:
    """An ``EngineObserver`` that passes everything on and remembers the latest loads."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self._loads: deque[Load] = deque(maxlen=_KEPT)
        self.step = observer.step
        self.queued = observer.queued
        self.first_token = observer.first_token
        self.inter_token = observer.inter_token
        self.finished = observer.finished
        self.preempted = observer.preempted
        self.adapter_load_failed = observer.adapter_load_failed
        self.adapter_evicted = observer.adapter_evicted

    def adapter_loaded(self, adapter: str, tier: str, seconds: float) -> None:
        """See ``EngineObserver``."""
        now = time.monotonic()
        self._loads.append(Load(adapter, tier, now - seconds, now))
        self._observer.adapter_loaded(adapter, tier, seconds)

    def during(self, adapter: str, start: float, end: float) -> list[Load]:
        """The adapter's loads that ended between both moments."""
        loads = tuple(self._loads)  # in one go: loader threads append meanwhile
        return [load for load in loads if load.adapter == adapter and start <= load.end <= end]
