"""The bound on the values of the ``adapter`` and ``tenant`` labels: the busiest names have one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

BASE_LABEL: Final = "base"
"""The bare base."""
OTHER_LABEL: Final = "other"
"""Every adapter beyond the bound."""

EPOCH_S: Final = 600.0
"""Traffic counts for one to two of these."""
LOOK: Final = 256
"""After so many requests it is looked at who is busiest."""
_BUSIER: Final = 2.0
_AT_LEAST: Final = 4
_EXEMPLAR: Final = 100


class LabelCap:
    """Bounds the values of a label: at most ``max_labels`` names have their own, others are
    ``other``.

    While there is room a name gets its label as it comes. Then the busiest ones have them:
    ``counted`` is told of each request, and every LOOK of them a name without a label takes that of
    the least busy name if it had more than twice its requests in the last ten to twenty minutes,
    and eight more (so that two alike do not change places for ever). ``dropped`` is told of the
    label that is gone, whose series are to be removed: one that ends is no reset to a rate.

    Traffic is counted in two frequent-items sketches, this epoch's and the last one's, so memory
    does not grow with the names. Thread-safe. An adapter that is itself
    called ``base`` or ``other`` gets ``adapter:base`` or ``adapter:other``.
    """

    def __init__(
        self,
        max_labels: int,
        *,
        dropped: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max = max_labels
        self._dropped = dropped
        self._clock = clock
        self._labels: dict[str, str] = {}
        self._lock = threading.Lock()
        self._seen = 0
        self._now, self._before = _Frequent(8 * max_labels), _Frequent(8 * max_labels)
        self._epoch_ends = clock() + EPOCH_S

    def label(self, name: str | None) -> str:
        """The label value of an adapter's name; None is the bare base."""
        if name is None:
            return BASE_LABEL
        known = self._labels.get(name)
        if known is not None:
            return known
        with self._lock:
            if name not in self._labels and len(self._labels) < self._max:
                self._labels[name] = _named(name)
            return self._labels.get(name, OTHER_LABEL)

    def counted(self, name: str | None) -> None:
        """A request of the name has ended."""
        if name is None:
            return
        gone: list[str] = []
        with self._lock:
            self._now.add(name)
            self._seen += 1
            if self._seen % LOOK == 0 and len(self._labels) >= self._max:
                gone = self._change()
            if self._clock() >= self._epoch_ends:
                self._before, self._now = self._now, _Frequent(8 * self._max)
                self._epoch_ends = self._clock() + EPOCH_S
        for label in gone:
            if self._dropped is not None:
                self._dropped(label)

    def _change(self) -> list[str]:
        """Give labels to who is much busier than who has them; the labels that went."""
        found = self._now.counts.keys() | self._before.counts.keys()
        outside = sorted(found - self._labels.keys(), key=self._traffic, reverse=True)
        inside = sorted(self._labels, key=self._traffic)
        gone = []
        for newcomer, leaver in zip(outside, inside, strict=False):
            if self._traffic(newcomer) <= _BUSIER * (self._traffic(leaver) + _AT_LEAST):
                break
            gone.append(self._labels.pop(leaver))
            self._labels[newcomer] = _named(newcomer)
        return gone

    def _traffic(self, name: str) -> int:
        return self._now.at_least(name) + self._before.at_least(name)


class _Frequent:
    """The most frequent of many names: Space-Saving (Metwally, Agrawal and El Abbadi 2005) with
    ``size`` counters. Where all are taken, a new name takes the least one's and remembers what of
    it is not its own. Not DataSketches': nanobind complains of its objects when the process ends.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.counts: dict[str, int] = {}
        self._others: dict[str, int] = {}

    def add(self, name: str) -> None:
        """Once more."""
        if name not in self.counts and len(self.counts) >= self._size:
            least = min(self.counts, key=self.counts.__getitem__)
            self._others.pop(least, None)
            self.counts[name] = self._others[name] = self.counts.pop(least)
        self.counts[name] = self.counts.get(name, 0) + 1

    def at_least(self, name: str) -> int:
        """How often it surely came."""
        return self.counts.get(name, 0) - self._others.get(name, 0)


def _named(name: str) -> str:
    return f"adapter:{name}" if name in (BASE_LABEL, OTHER_LABEL) else name


def exemplar(request_id: str) -> dict[str, str] | None:
    """A request to look at, as OpenMetrics' exemplar (at most 128 characters with its label)."""
    return {"request_id": request_id[:_EXEMPLAR]} if request_id else None


class LabelledRegistry(CollectorRegistry):
    """A registry that can forget a label's value in all of its series."""

    def __init__(self) -> None:
        super().__init__()
        self._labelled: list[MetricWrapperBase] = []

    def register(self, collector: Collector) -> None:
        """See CollectorRegistry."""
        super().register(collector)
        if isinstance(collector, MetricWrapperBase):
            self._labelled.append(collector)

    def forget(self, label: str, value: str) -> None:
        """Remove every series whose ``label`` has the ``value``."""
        for metric in self._labelled:
            if label in metric._labelnames:
                metric.remove_by_labels({label: value})
