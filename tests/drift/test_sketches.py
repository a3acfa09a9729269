"""Sketches merge and serialize; a merged one equals one that saw all, within its bound."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import SIGNALS, Kind
from manyhats.drift.sketches import K, NumberSketch


def sketch_of(values):
    made = NumberSketch()
    for value in values:
        made.add(float(value))
    return made


def through_json(sketch):
    return type(sketch).load(json.loads(json.dumps(sketch.dump())))


@pytest.mark.parametrize("split", [1, 700, 9_999])
def test_two_replicas_merged_equal_one_that_saw_all(split):
    rng = np.random.default_rng(split)
    values = rng.lognormal(3, 1, 20_000).astype(np.float32).astype(float)
    a, b, whole = sketch_of(values[:split]), sketch_of(values[split:]), sketch_of(values)
    merged = through_json(a)
    merged.merge(through_json(b))
    assert merged.count == whole.count == 20_000
    assert merged.sum == pytest.approx(whole.sum)
    assert merged.variance == pytest.approx(whole.variance)
    points = [float(q) for q in np.quantile(values, np.linspace(0.02, 0.98, 49))]
    truth = [float((values <= p).mean()) for p in points]
    for sketch in (merged, whole):
        assert 0 < sketch.rank_error < 0.014
        away = np.abs(np.asarray(sketch.cdf(points, inclusive=True)[:-1]) - truth)
        assert away.max() <= 1.5 * sketch.rank_error
    between = np.subtract(merged.cdf(points, inclusive=True), whole.cdf(points, inclusive=True))
    assert np.abs(between).max() <= merged.rank_error + whole.rank_error


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=K // 2))
def test_few_values_are_kept_exactly(values):
    sketch = through_json(sketch_of(values))
    assert sketch.rank_error == 0
    for value in values:
        at_most, below = (sketch.cdf([value], inclusive=i)[0] for i in (True, False))
        assert at_most == pytest.approx(np.mean(np.asarray(values) <= value))
        assert below == pytest.approx(np.mean(np.asarray(values) < value))


def test_no_size_grows_with_the_traffic():
    rng = np.random.default_rng(0)
    sizes = []
    sketch = NumberSketch()
    for _ in range(2):
        for value in rng.normal(size=50_000):
            sketch.add(float(value))
        sizes.append(len(json.dumps(sketch.dump())))
    assert max(sizes) < 7_000
    with pytest.raises(ValueError, match="NaN"):
        sketch.add(float("nan"))


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=lambda s: s.name)
def test_every_signal_keeps_and_merges(signal):
    rng = np.random.default_rng(3)

    def draw():
        if signal.kind is Kind.CATEGORY:
            return str(rng.choice(signal.categories))
        return float(rng.integers(0, 2)) if signal.kind is Kind.FLAG else signal.value(rng.random())

    halves = [SignalSketch(signal, interval=True) for _ in range(2)]
    whole = SignalSketch(signal, interval=True)
    for i in range(120):
        value = draw()
        halves[i % 2].add(value)
        whole.add(value)
    merged = SignalSketch.load(signal, json.loads(json.dumps(halves[0].dump())))
    merged.merge(halves[1])
    assert merged.count == whole.count == 120
    assert merged.categories == whole.categories
    if whole.mean is None:
        assert whole.interval is None
    else:
        assert merged.mean == pytest.approx(whole.mean)
        low, high = merged.interval.bounds(0.01)
        assert low <= signal.unit(whole.mean) <= high or signal.kind is Kind.NUMBER
        assert low <= merged.interval.mean <= high


def test_values_beyond_a_scale_count_as_its_ends_and_nan_as_the_worse_one():
    for signal in SIGNALS.values():
        if signal.kind is Kind.NUMBER:
            assert signal.unit(float("inf")) == 1
            assert signal.unit(float("-inf")) == 0
            assert signal.unit(signal.value(0.3)) == pytest.approx(0.3)
    assert SIGNALS["agreement"].unit(float("nan")) == 0
    assert SIGNALS["kl"].unit(float("nan")) == 1
