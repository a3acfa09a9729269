"""False alarms at or under the stated rate, and shifts that are found: fixed seeds, many runs."""

from __future__ import annotations

import numpy as np
import pytest

from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import SIGNALS
from manyhats.drift.track import Layout, Track, restored

LAYOUT = Layout(part=16, parts=4, least=2, calm=2)
REFERENCE, LIVE = 64, 128


def frozen(signal, values):
    sketch = SignalSketch(SIGNALS[signal], interval=True)
    for value in values:
        sketch.add(value)
    return sketch


def alarms(signal, known, live, alpha, **options):
    """The numbers of the values at which an alarm was raised."""
    track = Track(frozen(signal, known), alpha, LAYOUT, **options)
    return [i for i, value in enumerate(live) if track.add(value, float(i), f"r{i}")]


def lengths(rng, count, mean=5.0):
    return rng.lognormal(mean, 0.7, count)


def agreements(rng, count, a=18.0):
    return rng.beta(a, 3.0, count)


def flags(rng, count, share=0.08):
    return (rng.random(count) < share).astype(float)


def endings(rng, count, shares=(0.8, 0.19, 0.01)):
    return [str(v) for v in rng.choice(["stop", "length", "error"], count, p=shares)]


KINDS = {
    "output_tokens": lengths,
    "agreement": agreements,
    "empty": flags,
    "finish_reason": endings,
}


def test_false_alarms_over_two_thousand_runs_are_at_most_the_stated_rate():
    """The rate is that of any alarm in a run's whole life: 500 runs of each kind of signal."""
    alpha, raised, highest = 0.05, 0, 0.0
    for number, (signal, draw) in enumerate(KINDS.items()):
        for run in range(500):
            rng = np.random.default_rng((number, run))
            known, live = draw(rng, REFERENCE), draw(rng, LIVE)
            track = Track(frozen(signal, known), alpha, LAYOUT, one_sided=bool(run % 2))
            found = [track.add(v, float(i), "r") for i, v in enumerate(live)]
            raised += any(found)
            highest = max(highest, track.finding.score)
    assert raised <= 2000 * alpha
    assert highest > 0.3, "the scores come nowhere near the threshold: the test would not see"


@pytest.mark.parametrize(
    ("signal", "shifted"),
    [
        ("output_tokens", {"mean": 6.0}),
        ("agreement", {"a": 7.0}),
        ("empty", {"share": 0.5}),
        ("finish_reason", {"shares": (0.25, 0.7, 0.05)}),
    ],
)
def test_a_shift_is_found_within_a_window(signal, shifted):
    draw = KINDS[signal]
    for run in range(20):
        rng = np.random.default_rng((77, run))
        known = draw(rng, 300)
        live = [*draw(rng, 128), *draw(rng, 192, **shifted)]
        found = alarms(signal, known, live, 1e-3)
        assert len(found) == 1, "raised once, not at every look"
        assert 128 <= found[0] <= 128 + 160


def test_a_slow_decay_of_the_mean_is_found():
    rng = np.random.default_rng(5)
    known = agreements(rng, 400)
    decay = np.concatenate([np.full(200, 18.0), np.linspace(18, 6, 800)])
    live = [float(rng.beta(a, 3.0)) for a in decay]
    (first, *_) = alarms("agreement", known, live, 1e-3, one_sided=True)
    assert 300 < first < 900


def test_one_sided_tracks_ignore_what_is_better():
    rng = np.random.default_rng(6)
    better = agreements(rng, 600, a=200.0)
    assert alarms("agreement", agreements(rng, 300), better, 0.05, one_sided=True) == []
    assert alarms("agreement", agreements(rng, 300), better, 0.05) != []
    assert alarms("error", flags(rng, 300, 0.3), np.zeros(600), 0.05, one_sided=True) == []
    assert alarms("error", flags(rng, 300, 0.3), np.zeros(600), 0.05) != []


def test_an_alarm_says_what_moved_since_when_and_names_examples():
    rng = np.random.default_rng(8)
    track = Track(frozen("empty", flags(rng, 300)), 1e-3, LAYOUT)
    found = None
    for i in range(400):
        value = 0.0 if i < 200 else 1.0
        found = found or track.add(value, 1000.0 + i, f"r{i}")
    assert found.score >= 1
    assert found.signal == "empty"
    assert found.reference == pytest.approx(0.08, abs=0.04)
    assert found.window > 0.1
    assert 1150 <= found.since <= 1216
    assert {int(name[1:]) >= 200 for name in track.examples()} == {True}


def test_an_alarm_is_raised_again_only_after_calm():
    rng = np.random.default_rng(9)
    known = flags(rng, 300)
    spell = [*np.zeros(64), *np.ones(96)]
    calm = list(flags(rng, 320))
    assert len(alarms("empty", known, [*spell, *spell], 1e-3)) == 1
    assert len(alarms("empty", known, [*spell, *calm, *spell], 1e-3)) == 2


def test_a_restart_keeps_what_was_spent():
    rng = np.random.default_rng(10)
    known = frozen("empty", flags(rng, 300))
    track = Track(known, 0.01, LAYOUT)
    for i, value in enumerate(flags(rng, 320)):
        track.add(value, float(i), "r")
    again = restored(known, 0.01, LAYOUT, track.spent())
    assert again.looks == track.looks == 19
    assert again.rounds == track.rounds + 1
    for i in range(32):
        again.add(0.0, float(i), "r")
    assert again.finding.alpha < track.finding.alpha or again.looks == track.looks + 1
