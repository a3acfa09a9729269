"""One signal of one version over time: a sliding window, the tests, and when an alarm is raised.

What may be spent. A track has a false-alarm rate ``alpha`` for its whole life. Half goes to the
window tests: look number j spends ``alpha / 2 * share(j)`` (``detectors.spending``). The other half
goes to the mean: of it, half to the reference's interval (how far its own mean may lie from the
truth) and half to the bets, divided over the sides, and over the bets begun anew after an alarm
again by ``share``. So the probability of ever raising an alarm while nothing changes is at most
``alpha``, for independent values (Boole; Ville).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from manyhats.drift.alarms import Detector, Finding
from manyhats.drift.detectors import windows
from manyhats.drift.detectors.betting import MeanBet
from manyhats.drift.detectors.spending import share
from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import Kind, Signal, Worse

EXAMPLES: Final = 5
"""Request ids that an alarm names."""

_CALM: Final = 0.5
_PSI_ALPHA: Final = 0.01


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes in requests. A window is ``parts`` parts of ``part``; tests begin at ``least`` of them.

    After an alarm the score must stay under 0.5 for ``calm`` looks before another can be raised.
    """

    part: int = 32
    parts: int = 8
    least: int = 2
    calm: int = 8


@dataclass(slots=True)
class _Part:
    sketch: SignalSketch
    since: float
    examples: list[tuple[float, str]]


class Track:
    """Compares what comes with a frozen ``reference``. ``one_sided``: only the worse way counts."""

    def __init__(
        self,
        reference: SignalSketch,
        alpha: float,
        layout: Layout,
        *,
        one_sided: bool = False,
        looks: int = 0,
        rounds: int = 0,
    ) -> None:
        """``looks`` and ``rounds``: what was spent of ``alpha`` already, before a restart, say."""
        self.reference = reference
        self.signal: Signal = reference.signal
        self._alpha = alpha
        self._layout = layout
        self._worse = self.signal.worse if one_sided else Worse.EITHER
        self._ring: deque[_Part] = deque(maxlen=layout.parts)
        self._open: _Part | None = None
        self.looks = looks
        self.rounds = rounds + 1
        self.alarmed = False
        self._calm = 0
        self.finding: Finding | None = None
        self._known_mean = reference.mean or 0.0
        self._bets: list[MeanBet] = []
        self._bet_anew()

    def add(self, value: float | str, at: float, request_id: str) -> Finding | None:
        """One more value of Unix time ``at``; the finding, where it is an alarm that was not."""
        if self._open is None:
            self._open = _Part(SignalSketch(self.signal), at, [])
        self._open.sketch.add(value)
        self._keep_example(value, request_id)
        log_e = self._bet(value, at)
        closed = self._open.sketch.count >= self._layout.part
        if closed:
            self._ring.append(self._open)
            self._open = None
        if closed and len(self._ring) >= self._layout.least:
            return self._look(log_e)
        if self._bets and log_e >= self._bet_bar():
            return self._raise(self._found(log_e))
        return None

    def window(self) -> SignalSketch:
        """All values of the window, merged."""
        merged = SignalSketch(self.signal)
        for part in [*self._ring, *([self._open] if self._open else ())]:
            merged.merge(part.sketch)
        return merged

    def examples(self) -> tuple[str, ...]:
        """Requests of the window, the furthest from the reference first."""
        parts = [*self._ring, *([self._open] if self._open else ())]
        found = sorted((e for part in parts for e in part.examples), reverse=True)
        return tuple(request for _, request in found[:EXAMPLES])

    def spent(self) -> Mapping[str, int]:
        """What a restart must know of: the looks taken and the rounds of bets begun."""
        return {"looks": self.looks, "rounds": self.rounds}

    def _look(self, log_e: float) -> Finding | None:
        self.looks += 1
        self.finding = found = self._found(log_e)
        if self.alarmed:
            self._calm = self._calm + 1 if found.score < _CALM else 0
            if self._calm >= self._layout.calm:
                self.alarmed = False
                self._bet_anew()
            return None
        return self._raise(found) if found.score >= 1 else None

    def _raise(self, found: Finding) -> Finding:
        self.finding = found
        self.alarmed, self._calm = True, 0
        self.rounds += 1
        self._bets = []  # nothing is staked until it is calm again
        return found

    def _found(self, log_e: float) -> Finding:
        window = self.window()
        alpha = self._alpha / 2 * share(max(1, self.looks))
        statistic, log_p = self._compared(window) if self._tested else (0.0, 0.0)
        psi, bins = self._psi(window)
        by_window, by_mean = max(0.0, log_p / math.log(alpha)), max(0.0, log_e) / self._bet_bar()
        test = Detector.WINDOW if by_window >= by_mean else Detector.MEAN
        sizes = max(1, self.reference.count), max(1, window.count)
        return Finding(
            signal=self.signal.name,
            score=max(by_window, by_mean),
            test=test,
            statistic=statistic,
            log_p=log_p,
            log_e=log_e,
            alpha=alpha,
            psi=psi,
            psi_threshold=windows.psi_threshold(bins, *sizes, _PSI_ALPHA),
            reference=self.reference.mean,
            window=window.mean,
            window_count=window.count,
            since=self._since(test),
        )

    @property
    def _tested(self) -> bool:
        return self._open is None and len(self._ring) >= self._layout.least

    def _compared(self, window: SignalSketch) -> tuple[float, float]:
        """(statistic, log p) of the window test."""
        known = self.reference
        if window.numbers and known.numbers:
            error = known.numbers.rank_error + window.numbers.rank_error
            distance = windows.ks_distance(known.numbers, window.numbers, self._worse)
            return distance, windows.ks_log_p(distance, error, known.count, window.count)
        statistic = windows.g_statistic(known.categories, window.categories)
        more = None
        if self._worse is not Worse.EITHER:
            more = "1" if self._worse is Worse.UP else "0"
        found = windows.fisher_log_p(known.categories, window.categories, only_more=more)
        return statistic, found

    def _psi(self, window: SignalSketch) -> tuple[float, int]:
        """(PSI, bins) of the window."""
        if not window.count or not self.reference.count:
            return 0.0, 2
        if window.numbers and self.reference.numbers:
            return windows.psi_of_numbers(self.reference.numbers, window.numbers), 10
        categories = {*window.categories, *self.reference.categories}
        return windows.psi_of_counts(self.reference.categories, window.categories), len(categories)

    def _bet(self, value: float | str, at: float) -> float:
        if isinstance(value, str):
            return 0.0
        unit = self.signal.unit(value)
        return max((bet.add(unit, at) for bet in self._bets), default=0.0)

    def _bet_bar(self) -> float:
        """The logarithm that an e-value must reach: 1 / (its part of the rate)."""
        sides = 2 if self._worse is Worse.EITHER else 1
        return -math.log(self._alpha / 4 * share(self.rounds) / sides)

    def _bet_anew(self) -> None:
        interval = self.reference.interval
        if interval is None or self.signal.kind is Kind.CATEGORY:
            return
        low, high = interval.bounds(self._alpha / 4)
        sides = {Worse.UP: (True,), Worse.DOWN: (False,)}.get(self._worse, (True, False))
        self._bets = [
            MeanBet(low, high, interval.mean, interval.variance, upward=side) for side in sides
        ]

    def _since(self, test: Detector) -> float:
        """When what is seen now began: the rise of the wealth, or the window."""
        if test is Detector.MEAN and self._bets:
            best = max(self._bets, key=lambda bet: bet.log_wealth)
            if best.rising_since is not None:
                return best.rising_since
        parts = [*self._ring, *([self._open] if self._open else ())]
        return parts[0].since if parts else 0.0

    def _keep_example(self, value: float | str, request_id: str) -> None:
        """The part's requests that are furthest from the reference: away from its mean, or rare."""
        if self._open is None:
            return
        if isinstance(value, str):
            far = 1 - self.reference.categories[value] / max(1, self.reference.count)
        else:
            away = self.signal.unit(value) - self.signal.unit(self._known_mean)
            far = abs(away)
            if self._worse is not Worse.EITHER:
                far = away if self._worse is Worse.UP else -away
        kept = self._open.examples
        kept.append((far, request_id))
        kept.sort(reverse=True)
        del kept[EXAMPLES:]


def restored(
    reference: SignalSketch,
    alpha: float,
    layout: Layout,
    spent: Mapping[str, Any],
    *,
    one_sided: bool = False,
) -> Track:
    """A track after a restart: its windows begin anew, what was spent of its rate stays spent."""
    return Track(
        reference,
        alpha,
        layout,
        one_sided=one_sided,
        looks=int(spent.get("looks", 0)),
        rounds=int(spent.get("rounds", 0)),
    )
