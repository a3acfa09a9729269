"""Replicas over a real Redis: what they merge equals what one has that saw everything."""

from __future__ import annotations

import numpy as np
import pytest

from manyhats.drift.archive import FRESH_S, Archive
from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import SIGNALS
from manyhats.drift.store_redis import RedisDriftStore
from manyhats.drift.store_sqlite import SqliteDriftStore
from manyhats.drift.track import Layout
from manyhats.drift.watch import Sizes
from manyhats.types import AdapterRef, Digest

REF = AdapterRef("pirate", 1, Digest("ab" * 32))
NAMES = ("output_tokens", "repetition", "refusal", "script")
WIDE = Layout(part=256, parts=64)


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def fleet(redis_url, tmp_path):
    """(archives of two replicas over one Redis, one of a server that is alone, the clock)."""
    clock = Clock()
    stores = [RedisDriftStore(redis_url, "base"), RedisDriftStore(redis_url, "base")]
    alone = SqliteDriftStore(tmp_path / "drift.sqlite")
    yield [Archive(s, f"r{i}", clock) for i, s in enumerate(stores)], Archive(alone), clock
    for key in stores[0].items(""):
        stores[0].remove(key)
    for store in (*stores, alone):
        store.close()


def drawn(count, seed):
    """Requests' values of one replica's own kind of traffic."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            "output_tokens": float(rng.lognormal(3 + seed, 1)),
            "repetition": float(rng.beta(1 + seed, 3)),
            "refusal": float(rng.random() < 0.1),
            "script": str(rng.choice(["latin", "cyrillic", "none"], p=[0.7, 0.2, 0.1])),
        }


def feed(watch, archive, rows):
    for row in rows:
        watch.seen += 1
        watch.add(row, 0.0, "r")
        archive.frozen(watch)


def assert_equal(merged: SignalSketch, whole: SignalSketch, values):
    assert merged.count == whole.count == len(values)
    assert merged.categories == whole.categories
    if merged.numbers is None:
        return
    assert merged.mean == pytest.approx(whole.mean)
    assert 0 < merged.numbers.rank_error < 0.014
    signal = merged.signal
    scaled = [float(np.float32(signal.value(signal.unit(v)))) for v in values]
    points = sorted({float(q) for q in np.quantile(scaled, np.linspace(0.05, 0.95, 19))})
    truth = [float(np.mean(np.asarray(scaled) <= p)) for p in points]
    ours, theirs = (np.asarray(s.numbers.cdf(points, inclusive=True)[:-1]) for s in (merged, whole))
    assert np.abs(ours - truth).max() <= 1.5 * merged.numbers.rank_error
    assert np.abs(ours - theirs).max() <= merged.numbers.rank_error + whole.numbers.rank_error


def test_live_windows_merged_through_the_store_equal_those_of_one_that_saw_all(fleet):
    archives, alone, _ = fleet
    sizes = Sizes(0, 64, 16, WIDE, WIDE, WIDE)
    watches = [a.open(REF, 0.05, sizes) for a in archives]
    whole = alone.open(REF, 0.05, sizes)
    feed(watches[0], archives[0], drawn(64, 0))
    archives[0].save(watches[0])
    archives[1].save(watches[1])  # takes over what the first has frozen
    feed(whole, alone, drawn(64, 0))
    assert set(watches[1].tracks) == set(whole.tracks) == set(NAMES)
    rows = [list(drawn(2_000, seed)) for seed in (0, 1)]
    for watch, archive, of in zip(watches, archives, rows, strict=True):
        feed(watch, archive, of)
        archive.save(watch)
    feed(whole, alone, [row for pair in zip(*rows, strict=True) for row in pair])
    replicas, windows = archives[0].windows(watches[0])
    assert (replicas, alone.windows(whole)[0]) == (2, 1)
    for name in NAMES:
        values = [row[name] for of in rows for row in of]
        assert_equal(windows[name], whole.tracks[name].window(), values)


def test_a_reference_merged_through_the_store_equals_that_of_one_that_saw_all(fleet):
    archives, _, _ = fleet
    sizes = Sizes(0, 2_000, 16, WIDE, WIDE, WIDE)
    watches = [a.open(REF, 0.05, sizes) for a in archives]
    rows = [list(drawn(1_200, seed)) for seed in (0, 1)]
    for watch, archive, of in zip(watches, archives, rows, strict=True):
        feed(watch, archive, of)
    for number in (0, 1, 0):
        archives[number].save(watches[number])
    for name in NAMES:
        values = [row[name] for of in rows for row in of]
        whole = SignalSketch(SIGNALS[name])
        for value in values:
            whole.add(value)
        frozen = [watch.references.frozen[name] for watch in watches]
        assert frozen[0].dump() == frozen[1].dump()
        assert_equal(frozen[0], whole, values)


def test_a_replica_that_is_gone_and_a_reference_begun_anew_are_noticed(fleet):
    archives, _, clock = fleet
    sizes = Sizes(0, 64, 16, WIDE, WIDE, WIDE)
    watches = [a.open(REF, 0.05, sizes) for a in archives]
    for number in (0, 1):
        feed(watches[number], archives[number], drawn(100, number))
        archives[number].save(watches[number])
    assert archives[0].windows(watches[0])[0] == 2
    clock.now += FRESH_S + 1
    assert archives[0].windows(watches[0])[0] == 1
    archives[0].forget(watches[0])
    archives[1].save(watches[1])
    assert watches[1].references.frozen == {}
    assert watches[1].tracks == {}
