"""Two-sample tests of a window against the reference, on sketches and counts.

Numbers: Kolmogorov-Smirnov, its distance lessened by what the sketches may err. Categories and
flags: Fisher's exact test of each category, so that the tail is right far below 1e-6, where the
chi-squared limit of the G-test is not. PSI is shown beside them, with its calibrated threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from manyhats.drift.signals import Worse
from manyhats.drift.sketches import NumberSketch

_POINTS: Final = 64
_CONSTANT: Final = 2.16863
_PSI_BINS: Final = 10


def ks_distance(
    reference: NumberSketch, window: NumberSketch, worse: Worse = Worse.EITHER
) -> float:
    """sup |F_window - F_reference| over 128 quantiles of the two, 0 to 1; a lower bound of all.

    One-sided where ``worse`` says so: UP sees only a window whose values are greater.
    """
    points = sorted({*reference.quantiles(_POINTS), *window.quantiles(_POINTS)})
    distance = 0.0
    for inclusive in (True, False):
        ours = np.asarray(window.cdf(points, inclusive=inclusive))
        known = np.asarray(reference.cdf(points, inclusive=inclusive))
        apart = ours - known
        if worse is Worse.UP:
            apart = -apart
        elif worse is Worse.EITHER:
            apart = np.abs(apart)
        distance = max(distance, float(apart.max(initial=0.0)))
    return distance


def ks_log_p(distance: float, error: float, reference: int, window: int) -> float:
    """Natural logarithm of a bound of the p-value of a KS distance.

    ``log(2.17) - 2 (nm / (n + m)) max(0, D - error)^2``: the two-sample Dvoretzky-Kiefer-Wolfowitz
    inequality (Wei and Dudley 2012, Two-sample Dvoretzky-Kiefer-Wolfowitz inequalities: C = 2.16863
    for n = m >= 4, smaller for larger). It holds for discrete values too. ``error``: what the two
    sketches may err in rank together.
    """
    if not reference or not window:
        return 0.0
    scale = reference * window / (reference + window)
    return min(0.0, math.log(_CONSTANT) - 2 * scale * max(0.0, distance - error) ** 2)


def fisher_log_p(
    reference: Mapping[str, int], window: Mapping[str, int], *, only_more: str | None = None
) -> float:
    """Natural logarithm of a bound of the p-value that both have the same shares of categories.

    For each category, the window's count given the sum of both is hypergeometric (Fisher's exact
    test); twice the smaller tail, times the categories (Bonferroni). ``only_more``: the upper tail
    of that one category alone.
    """
    n, m = sum(window.values()), sum(reference.values())
    if not n or not m:
        return 0.0
    if only_more is not None:
        known = reference.get(only_more, 0)
        return _tail(window.get(only_more, 0), n, known + window.get(only_more, 0), n + m)
    categories = sorted({*reference, *window})
    best = 0.0
    for category in categories:
        ours, both = window.get(category, 0), window.get(category, 0) + reference.get(category, 0)
        upper = _tail(ours, n, both, n + m)
        lower = _tail(n - ours, n, n + m - both, n + m)
        best = min(best, min(upper, lower) + math.log(2 * len(categories)))
    return best


def _tail(drawn: int, draws: int, marked: int, population: int) -> float:
    """log P(X >= drawn), X hypergeometric."""
    counts = np.arange(drawn, min(draws, marked) + 1)
    logs = (
        _choose(marked, counts)
        + _choose(population - marked, draws - counts)
        - _choose(population, np.asarray(draws))
    )
    logs = logs[np.isfinite(logs)]
    if not logs.size:
        return 0.0
    top = float(logs.max())
    return min(0.0, top + math.log(float(np.exp(logs - top).sum())))


def _choose(n: int, k: np.ndarray) -> np.ndarray:
    """log of the binomial coefficient; -inf where it is 0."""
    from scipy.special import gammaln  # here: it would take half a second of every start

    inside = (k >= 0) & (k <= n)
    k = np.where(inside, k, 0)
    found = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.asarray(np.where(inside, found, -np.inf))


def g_statistic(reference: Mapping[str, int], window: Mapping[str, int]) -> float:
    """The G statistic of the two rows of counts, 2 sum O ln(O / E): how much, not whether."""
    n, m = sum(window.values()), sum(reference.values())
    total = 0.0
    for category in {*reference, *window}:
        both = reference.get(category, 0) + window.get(category, 0)
        for observed, size in ((reference.get(category, 0), m), (window.get(category, 0), n)):
            if observed:
                total += observed * math.log(observed * (n + m) / (both * size))
    return 2 * total


def psi_of_numbers(reference: NumberSketch, window: NumberSketch) -> float:
    """The population stability index over ten bins of equal mass in the reference.

    sum (p - q) ln(p / q), each count with half a request added so that an empty bin stays finite.
    """
    edges = sorted({*reference.quantiles(_PSI_BINS - 1)})
    shares = [
        np.diff([0.0, *sketch.cdf(edges, inclusive=True)]) * sketch.count
        for sketch in (reference, window)
    ]
    return _psi(*shares)


def psi_of_counts(reference: Mapping[str, int], window: Mapping[str, int]) -> float:
    """The same over categories."""
    categories = sorted({*reference, *window})
    return _psi(
        np.asarray([float(reference.get(c, 0)) for c in categories]),
        np.asarray([float(window.get(c, 0)) for c in categories]),
    )


def _psi(reference: np.ndarray, window: np.ndarray) -> float:
    p = (reference + 0.5) / (reference.sum() + 0.5 * len(reference))
    q = (window + 0.5) / (window.sum() + 0.5 * len(window))
    return float(((p - q) * np.log(p / q)).sum())


def psi_threshold(bins: int, reference: int, window: int, alpha: float) -> float:
    """What the PSI of equal distributions exceeds with probability ``alpha``.

    It is about (1/n + 1/m) chi-squared with bins - 1 degrees of freedom (Yurdakul 2018, Statistical
    Properties of Population Stability Index), not the 0.1 and 0.25 of folklore.
    """
    from scipy.special import chdtri

    return float((1 / reference + 1 / window) * chdtri(max(1, bins - 1), alpha))
