"""Which adapters were hot: decay, bounds, the file, and what of it is prefetched."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.lifecycle import warm
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.warm import HALF_LIFE_S, HotAdapter, RecentUse, known, load, save
from manyhats.types import AdapterRef, Composition, CompositionKind, Digest, TenantId


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ref(name: str, version: int = 1, digest: str = "ab") -> AdapterRef:
    return AdapterRef(name, version, Digest(digest * 32))


uses = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 5000)), max_size=40)


@given(uses, st.integers(1, 6))
def test_scores_are_the_sum_of_halved_uses(events, limit):
    clock, expected = Clock(), dict.fromkeys(range(6), 0.0)
    recent = RecentUse(clock=clock)
    for name, pause in events:
        clock.now += pause
        recent.note(ref(f"a{name}"))
        expected = {k: v * 0.5 ** (pause / HALF_LIFE_S) for k, v in expected.items()}
        expected[name] += 1
    found = {h.name: h.score for h in recent.hottest(limit)}
    want = sorted(((v, f"a{k}") for k, v in expected.items() if v), reverse=True)[:limit]
    assert sorted(found.values(), reverse=True) == pytest.approx([v for v, _ in want])
    assert all(score == pytest.approx(expected[int(name[1:])]) for name, score in found.items())


@given(st.lists(st.integers(0, 200), max_size=120))
def test_memory_is_bounded_and_the_hottest_stays(names):
    clock = Clock()
    recent = RecentUse(most=8, clock=clock)
    for _ in range(1000):
        recent.note(ref("hot"))
    for name in names:
        recent.note(ref(f"a{name}"))
    kept = recent.hottest(1000)
    assert len(kept) <= 8
    assert kept[0].name == "hot"


def test_a_composition_counts_for_its_members_and_the_base_for_nobody():
    recent = RecentUse(clock=Clock())
    members = (ref("b"), ref("a"))
    composed = AdapterRef(
        "stack(b@1,a@1)",
        0,
        Digest("cd" * 32),
        composition=Composition(CompositionKind.STACK, members),
    )
    recent.note(composed)
    recent.note(None)
    assert [(h.name, h.score) for h in recent.hottest(9)] == [("a", 1.0), ("b", 1.0)]


def test_the_file_comes_back_as_it_was_written(tmp_path):
    hot = [HotAdapter(name="é", version=3, digest="ab" * 32, score=1.5)]
    save(tmp_path / "hot.json", hot)
    assert load(tmp_path / "hot.json") == tuple(hot)
    assert [p.name for p in tmp_path.iterdir()] == ["hot.json"]
    recent = RecentUse(clock=Clock())
    recent.restore(hot)
    assert recent.hottest(5) == hot


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2, "adapters": []}', '{"format": 1, "adapters": [{}]}']
)
def test_a_file_that_cannot_be_read_is_a_cold_start_and_is_said(tmp_path, caplog, text):
    (tmp_path / "hot.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "hot.json") == ()
    assert "nothing is prefetched" in caplog.text


class Prefetched:
    def __init__(self) -> None:
        self.refs: list[AdapterRef] = []
        self.seen = asyncio.Event()

    def prefetch(self, ref: AdapterRef) -> None:
        self.refs.append(ref)
        self.seen.set()

    def drop(self, ref: AdapterRef) -> None:
        raise AssertionError("nothing is dropped")


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path / "registry.sqlite", max_versions=100)
    for name in ("hot", "cool", "changed"):
        registry.add(
            name,
            Digest("ab" * 32),
            tenant=TenantId("default"),
            family="lora",
            max_rank=1,
            nbytes=1,
            source="here",
        )
    yield registry
    registry.close()


def test_only_what_still_means_the_same_is_prefetched_hottest_first(registry):
    hot = [
        HotAdapter(name="cool", version=1, digest="ab" * 32, score=9),
        HotAdapter(name="hot", version=1, digest="ab" * 32, score=8),
        HotAdapter(name="hot", version=7, digest="ab" * 32, score=7),
        HotAdapter(name="changed", version=1, digest="cd" * 32, score=6),
        HotAdapter(name="gone", version=1, digest="ab" * 32, score=5),
    ]
    assert [str(r) for r in known(registry, hot)] == ["cool@1", "hot@1"]


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_run_prefetches_and_writes_at_most_the_limit(registry, tmp_path, limit):
    file = tmp_path / "hot.json"
    hot = [
        HotAdapter(name=n, version=1, digest="ab" * 32, score=s)
        for n, s in (("hot", 3), ("cool", 2))
    ]
    save(file, hot)
    written = file.read_bytes()

    async def run() -> list[str]:
        residency, recent = Prefetched(), RecentUse(clock=Clock())
        async with warm.warm(recent, file, registry, residency, limit=limit, period_s=3600):
            for _ in range(5):
                recent.note(ref("cool"))
            while len(residency.refs) < limit:
                residency.seen.clear()
                await residency.seen.wait()
        return [r.name for r in residency.refs]

    assert asyncio.run(run()) == ["hot", "cool"][:limit]
    if limit == 0:
        assert file.read_bytes() == written
    else:
        names = [row["name"] for row in json.loads(file.read_text())["adapters"]]
        assert names == ["cool", "hot"][:limit]


def test_a_full_disk_is_said_and_stops_nothing(registry, tmp_path, caplog):
    async def run() -> None:
        where = tmp_path / "nowhere" / "hot.json"
        async with warm.warm(RecentUse(), where, registry, Prefetched(), limit=3):
            pass

    asyncio.run(run())
    assert "cannot be written" in caplog.text
