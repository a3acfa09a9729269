"""What is kept of many values: a quantile sketch with exact sums, or counts. They merge and
serialize, and their size does not grow with the traffic.

Quantiles are Apache DataSketches' KLL of floats. Categories are a closed list (see ``signals``), so
that plain counts are exact and smaller than its frequent-items sketch, which is for open ones.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from datasketches import kll_floats_sketch

K: Final = 256
"""KLL's size: ranks are right within 1.05 % (in 99 of 100 sketches), 5 KB at most."""


class NumberSketch:
    """Numbers: their quantiles about, their count, mean and variance exactly."""

    def __init__(self) -> None:
        self._kll: Any = kll_floats_sketch(K)
        self.sum = 0.0
        self.squares = 0.0

    @property
    def count(self) -> int:
        """How many numbers."""
        return int(self._kll.n)

    @property
    def mean(self) -> float:
        """Their mean; NaN of none."""
        return self.sum / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """Their variance (of the population); NaN of none."""
        if not self.count:
            return math.nan
        return max(0.0, self.squares / self.count - self.mean**2)

    @property
    def rank_error(self) -> float:
        """What a rank may err (99 %, by DataSketches' tables); 0 while every number is kept."""
        return float(self._kll.normalized_rank_error(False)) if self._estimates else 0.0

    @property
    def _estimates(self) -> bool:
        return bool(self._kll.is_estimation_mode())

    def add(self, value: float) -> None:
        """One more number; a NaN is the caller's mistake (ValueError)."""
        if math.isnan(value):
            raise ValueError("a sketch takes no NaN")
        self._kll.update(value)
        self.sum += value
        self.squares += value * value

    def merge(self, other: NumberSketch) -> None:
        """Add another one's numbers."""
        self._kll.merge(other._kll)
        self.sum += other.sum
        self.squares += other.squares

    def cdf(self, points: Sequence[float], *, inclusive: bool) -> list[float]:
        """P(X <= point) (``inclusive``) or P(X < point) at increasing points, then 1."""
        return list(self._kll.get_cdf(points, inclusive))

    def quantiles(self, count: int) -> list[float]:
        """The ``count`` inner quantiles at equal distances; empty of no numbers."""
        if not self.count:
            return []
        ranks = [(i + 1) / (count + 1) for i in range(count)]
        return [float(q) for q in self._kll.get_quantiles(ranks, True)]

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        kept = base64.b64encode(self._kll.serialize()).decode()
        return {"kll": kept, "sum": self.sum, "squares": self.squares}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> NumberSketch:
        """What ``dump`` gave."""
        made = cls()
        made._kll = kll_floats_sketch.deserialize(base64.b64decode(value["kll"]))
        made.sum, made.squares = float(value["sum"]), float(value["squares"])
        return made


class CountSketch:
    """Categories and how often each came."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """How many values."""
        return self.counts.total()

    def add(self, category: str) -> None:
        """One more value."""
        self.counts[category] += 1

    def merge(self, other: CountSketch) -> None:
        """Add another one's."""
        self.counts.update(other.counts)

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {"counts": dict(self.counts)}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> CountSketch:
        """What ``dump`` gave."""
        made = cls()
        made.counts.update({str(name): int(count) for name, count in value["counts"].items()})
        return made
