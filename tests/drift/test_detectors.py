"""Each bound on its own: what it adds up to, and against what scipy says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from manyhats.drift.detectors import windows
from manyhats.drift.detectors.betting import MeanBet, MeanInterval
from manyhats.drift.detectors.spending import share
from manyhats.drift.signals import Worse
from manyhats.drift.sketches import NumberSketch


def sketch_of(values):
    made = NumberSketch()
    for value in values:
        made.add(float(value))
    return made


def test_shares_come_to_one():
    total = math.fsum(share(i) for i in range(1, 2**17))
    assert total == pytest.approx(1 - 1 / 18)
    assert all(share(i) >= share(i + 1) for i in range(1, 5000))
    with pytest.raises(ValueError, match="from 1"):
        share(0)


@given(st.integers(0, 2**31), st.integers(4, 100), st.integers(4, 100))
def test_the_ks_distance_is_scipys_and_its_p_value_is_no_smaller(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 12, n) / 4, rng.integers(1, 14, m) / 4
    known, now = sketch_of(a), sketch_of(b)
    truth = stats.ks_2samp(a, b, method="exact")
    distance = windows.ks_distance(known, now)
    assert distance == pytest.approx(truth.statistic, abs=1e-6)
    assert windows.ks_log_p(distance, 0, n, m) >= math.log(max(truth.pvalue, 1e-300)) - 1e-6
    more = windows.ks_distance(known, now, Worse.UP)
    assert more == pytest.approx(
        stats.ks_2samp(a, b, alternative="greater", method="asymp").statistic, abs=1e-6
    )
    assert windows.ks_log_p(distance, 1, n, m) == 0 or distance > 1


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 60), st.integers(1, 60))
def test_one_tail_of_fishers_test_is_scipys(a, b, c, d):
    known, now = {"1": a, "0": b}, {"1": c, "0": d}
    truth = stats.fisher_exact([[c, d], [a, b]], alternative="greater").pvalue
    found = windows.fisher_log_p(known, now, only_more="1")
    assert found == pytest.approx(math.log(truth), abs=1e-6)
    both = stats.fisher_exact([[c, d], [a, b]]).pvalue
    assert windows.fisher_log_p(known, now) >= math.log(both) - 1e-6


def test_the_g_statistic_is_scipys():
    known, now = {"a": 30, "b": 50, "c": 20}, {"a": 40, "b": 20, "c": 9}
    table = [[30, 50, 20], [40, 20, 9]]
    truth = stats.chi2_contingency(table, lambda_="log-likelihood").statistic
    assert windows.g_statistic(known, now) == pytest.approx(truth)


def test_the_psi_of_equal_distributions_passes_its_threshold_as_often_as_stated():
    rng = np.random.default_rng(3)
    bar = windows.psi_threshold(10, 400, 200, 0.05)
    over = 0
    for _ in range(400):
        known, now = sketch_of(rng.normal(size=400)), sketch_of(rng.normal(size=200))
        over += windows.psi_of_numbers(known, now) > bar
    assert 2 <= over <= 40, "20 expected"
    shifted = windows.psi_of_numbers(known, sketch_of(rng.normal(1, 1, 200)))
    assert shifted > 5 * bar
    assert windows.psi_of_counts({"a": 50, "b": 50}, {"a": 5, "b": 95}) > 0.5


@pytest.mark.parametrize(
    ("truth", "draw"),
    [
        (2 / 7, lambda rng, n: rng.beta(2, 5, n)),
        (0.03, lambda rng, n: (rng.random(n) < 0.03).astype(float)),
        (0.5, lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, 1.0)),
    ],
    ids=["beta", "rare", "coin"],
)
def test_the_interval_holds_the_mean_and_narrows(truth, draw):
    missed, widths = 0, []
    for run in range(60):
        interval = MeanInterval()
        for value in draw(np.random.default_rng((4, run)), 300):
            interval.add(float(value))
        low, high = interval.bounds(0.05)
        missed += not low <= truth <= high
        widths.append(high - low)
    assert missed <= 6
    assert np.mean(widths) < 0.35


def test_two_intervals_merge():
    rng = np.random.default_rng(12)
    halves = [MeanInterval(), MeanInterval()]
    for i, value in enumerate(rng.beta(2, 5, 400)):
        halves[i % 2].add(float(value))
    alone = halves[0].bounds(0.01)
    halves[0].merge(MeanInterval.load(halves[1].dump()))
    low, high = halves[0].bounds(0.01)
    assert halves[0].count == 400
    assert high - low < alone[1] - alone[0]
    assert low < 2 / 7 < high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.floats(0.05, 0.95))
def test_a_bet_never_loses_all_and_stays_still_within_the_interval(values, mean):
    bets = [MeanBet(0.0, 1.0, mean, 0.1, upward=side) for side in (True, False)]
    narrow = [MeanBet(mean, mean, mean, 0.1, upward=side) for side in (True, False)]
    for i, value in enumerate(values):
        assert [bet.add(value, float(i)) for bet in bets] == [0.0, 0.0]
        assert all(math.isfinite(bet.add(value, float(i))) for bet in narrow)


def test_the_wealth_of_a_bet_on_the_true_mean_is_one_at_most_in_expectation():
    """The supermartingale itself: the mean wealth over many runs at a fixed time."""
    wealth = []
    for run in range(400):
        rng = np.random.default_rng((9, run))
        bet = MeanBet(0.5, 0.5, 0.5, 0.08, upward=True)
        for i, value in enumerate(rng.beta(2, 2, 60)):
            bet.add(float(value), float(i))
        wealth.append(math.exp(bet.log_wealth))
    assert np.mean(wealth) < 1.15
    assert np.std(wealth) > 0.05, "nothing was staked"
