"""What a signal looked like when its version was promoted; collected, then frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from manyhats.drift.detectors.betting import MeanInterval
from manyhats.drift.signals import Kind, Signal
from manyhats.drift.sketches import CountSketch, NumberSketch


class SignalSketch:
    """A signal's values: a quantile sketch of a number, else counts. The mean interval is there
    only where it is asked for (a reference has one, a window none).
    """

    def __init__(self, signal: Signal, *, interval: bool = False) -> None:
        self.signal = signal
        self.numbers = NumberSketch() if signal.kind is Kind.NUMBER else None
        self.counts = None if signal.kind is Kind.NUMBER else CountSketch()
        wanted = interval and signal.kind is not Kind.CATEGORY
        self.interval = MeanInterval() if wanted else None

    @property
    def count(self) -> int:
        """How many values."""
        return self.numbers.count if self.numbers else self.categories.total()

    @property
    def categories(self) -> Counter[str]:
        """The counts of a category or of a flag (``0``, ``1``); empty of a number."""
        return self.counts.counts if self.counts else Counter()

    @property
    def mean(self) -> float | None:
        """The mean of the numbers, the share of a flag; None of categories or of nothing."""
        if not self.count or self.signal.kind is Kind.CATEGORY:
            return None
        if self.numbers:
            return self.numbers.mean
        return self.categories["1"] / self.count

    def add(self, value: float | str) -> None:
        """One more value; a category beyond the signal's list counts as ``other``."""
        if isinstance(value, str):
            known = value in self.signal.categories
            self._counted().add(value if known else "other")
            return
        unit = self.signal.unit(value)
        if self.numbers:
            self.numbers.add(self.signal.value(unit))
        else:
            self._counted().add("1" if value else "0")
        if self.interval:
            self.interval.add(unit)

    def merge(self, other: SignalSketch) -> None:
        """Add another replica's or another window's values."""
        if self.numbers and other.numbers:
            self.numbers.merge(other.numbers)
        if self.counts and other.counts:
            self.counts.merge(other.counts)
        if self.interval and other.interval:
            self.interval.merge(other.interval)

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "values": (self.numbers or self._counted()).dump(),
            "interval": self.interval.dump() if self.interval else None,
        }

    @classmethod
    def load(cls, signal: Signal, value: Mapping[str, Any]) -> SignalSketch:
        """What ``dump`` gave."""
        made = cls(signal)
        if signal.kind is Kind.NUMBER:
            made.numbers = NumberSketch.load(value["values"])
        else:
            made.counts = CountSketch.load(value["values"])
        if value["interval"] is not None:
            made.interval = MeanInterval.load(value["interval"])
        return made

    def _counted(self) -> CountSketch:
        if self.counts is None:
            raise TypeError(f"{self.signal.name} is a number, not a category")
        return self.counts
