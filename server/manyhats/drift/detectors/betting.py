"""Means of bounded values, by betting: an interval for the reference's, an e-process for the rest.

After Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B
2024). A bettor who starts with 1 and stakes on values being greater than m has a wealth that is a
nonnegative supermartingale if the mean is at most m; by Ville's inequality it ever reaches 1/alpha
with a probability of at most alpha, however often one looks.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_GRID: Final = 257
_BOLD: Final = 0.9
_TUNED_FOR: Final = 1e-5
_MEMORY: Final = 64.0

Vector = npt.NDArray[np.float64]
_MEANS: Final[Vector] = np.linspace(0.0, 1.0, _GRID)
with np.errstate(divide="ignore"):
    _MOST: Final[Vector] = _BOLD / _MEANS  # the boldest stake on more; on less it is the mirror


class MeanInterval:
    """A confidence interval for the mean of values in [0, 1], with no assumption but that.

    For each of 257 candidate means two bettors, one on more and one on less, keep their wealth
    (the hedged capital process); those whom neither refutes are the interval, out to the next
    refuted ones. Independent ones
    merge by adding logarithms.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._squares = 0.25  # around the running mean, with a quarter to begin with
        self._more: Vector = np.zeros(_GRID)
        self._less: Vector = np.zeros(_GRID)

    def add(self, value: float) -> None:
        """One more value."""
        t = self.count + 1
        variance = self._squares / t
        stake = math.sqrt(2 * math.log(2 / _TUNED_FOR) / (variance * t * math.log(1 + t)))
        more, away = np.minimum(stake, _MOST), value - _MEANS
        self._more += np.log1p(more * away)
        self._less += np.log1p(-more[::-1] * away)
        self.count = t
        self._sum += value
        mean = (0.5 + self._sum) / (t + 1)
        self._squares += (value - mean) ** 2

    def bounds(self, alpha: float) -> tuple[float, float]:
        """The interval, which misses the mean with a probability of at most ``alpha``."""
        bar = math.log(2 / alpha)
        greater, smaller = np.flatnonzero(self._more >= bar), np.flatnonzero(self._less >= bar)
        low = float(_MEANS[greater[-1]]) if greater.size else 0.0
        high = float(_MEANS[smaller[0]]) if smaller.size else 1.0
        return min(low, high), max(low, high)

    @property
    def mean(self) -> float:
        """The sample's mean; one half of none."""
        return self._sum / self.count if self.count else 0.5

    @property
    def variance(self) -> float:
        """About the sample's variance, never 0."""
        return self._squares / (self.count + 1)

    def merge(self, other: MeanInterval) -> None:
        """Add another one's values, which are independent of these."""
        self.count += other.count
        self._sum += other._sum
        self._squares += other._squares - 0.25
        self._more += other._more
        self._less += other._less

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "n": self.count,
            "sum": self._sum,
            "squares": self._squares,
            "more": base64.b64encode(self._more.tobytes()).decode(),
            "less": base64.b64encode(self._less.tobytes()).decode(),
        }

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> MeanInterval:
        """What ``dump`` gave."""
        made = cls()
        made.count, made._sum = int(value["n"]), float(value["sum"])
        made._squares = float(value["squares"])
        made._more = np.frombuffer(base64.b64decode(value["more"])).copy()
        made._less = np.frombuffer(base64.b64decode(value["less"])).copy()
        return made


class MeanBet:
    """An e-process against "the mean is within [low, high]", one-sided: ``upward`` bets on more.

    Each stake is aGRAPA's, (m' - m) / (v + (m' - m)^2) with m' and v the mean and variance of the
    latest values, exponentially forgotten so that a late change is not drowned in a long past; 0
    while m' is within the interval, so that peace costs nothing. Any stake that depends on the past
    alone is valid.
    """

    def __init__(
        self, low: float, high: float, mean: float, variance: float, *, upward: bool
    ) -> None:
        self._bound = high if upward else 1 - low
        self._upward = upward
        self._mean = mean if upward else 1 - mean
        self._variance = max(variance, 1e-6)
        self.log_wealth = 0.0
        self.rising_since: float | None = None
        """The ``at`` of the value after which the wealth stayed over 1; None where it is not."""

    def add(self, value: float, at: float) -> float:
        """One more value, of time ``at``; the logarithm of the e-value after it."""
        value = value if self._upward else 1 - value
        above = self._mean - self._bound
        if above > 0:
            stake = min(above / (self._variance + above**2), _BOLD / max(self._bound, 1e-9))
            self.log_wealth += math.log1p(stake * (value - self._bound))
        if self.log_wealth <= 0:
            self.rising_since = None
        elif self.rising_since is None:
            self.rising_since = at
        weight = 1 / _MEMORY
        self._variance += weight * ((value - self._mean) ** 2 - self._variance)
        self._variance = max(self._variance, 1e-6)
        self._mean += weight * (value - self._mean)
        return self.log_wealth
