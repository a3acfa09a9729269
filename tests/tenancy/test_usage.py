"""One contract over both stores of usage, and the ledger that adds to them."""

from __future__ import annotations

import asyncio

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from manyhats.errors import ConfigError, ServiceError
from manyhats.tenancy.limiter import MemoryLimiter
from manyhats.tenancy.model import Quotas
from manyhats.tenancy.quota import DAY_S
from manyhats.tenancy.usage import Counts, UsageKey, UsageLedger, UsageRow
from manyhats.tenancy.usage_redis import RedisUsageStore
from manyhats.tenancy.usage_sqlite import SqliteUsageStore

DAY = 20_000
ONE = {UsageKey(DAY, "acme", "a"): Counts(1, 20, 300)}


class Clock:
    def __init__(self) -> None:
        self.now = DAY * DAY_S + 7

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["sqlite", "redis"])
def open_store(request, tmp_path):
    """Opens the same store again and again, as several processes would."""
    opened = []
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        with redis.Redis.from_url(url) as client:
            client.flushall()

    def opener():
        sqlite = request.param == "sqlite"
        opened.append(SqliteUsageStore(tmp_path / "f") if sqlite else RedisUsageStore(url))
        return opened[-1]

    yield opener
    for store in opened:
        store.close()


def test_what_is_added_is_a_sum_and_a_batch_counts_once(open_store):
    store, other = open_store(), open_store()
    base = UsageKey(DAY, "acme", None)
    store.add("1", {**ONE, base: Counts(1, 1, 1)}, 0)
    store.add("1", {**ONE, base: Counts(1, 1, 1)}, 0)
    other.add("2", ONE, 0)
    assert (
        store.read(0)
        == other.read(DAY)
        == {
            UsageKey(DAY, "acme", "a"): Counts(2, 40, 600),
            base: Counts(1, 1, 1),
        }
    )
    assert store.read(DAY + 1) == {}


def test_old_days_are_forgotten(open_store):
    store = open_store()
    store.add("1", ONE, DAY)
    later = {UsageKey(DAY + 1, "acme", "a"): Counts(1, 1, 1)}
    store.add("2", later, DAY + 1)
    assert store.read(0) == later
    store.replace(ONE)
    assert store.read(0) == ONE


def test_a_ledger_goes_on_where_it_ended_and_sums_over_servers(open_store):
    clock = Clock()
    first, second = (UsageLedger(open_store(), days=3, clock=clock) for _ in range(2))
    first.add("acme", "a", 2, 3)
    second.add("acme", "a", 20, 30)
    second.add("acme", None, 1, 1)
    assert first.rows() == [UsageRow("acme", "a", 1, 2, 3)], "not yet told to anybody"
    with second.flushing(period_s=1000):
        pass
    both = [UsageRow("acme", None, 1, 1, 1), UsageRow("acme", "a", 2, 22, 33)]
    assert first.rows() == both
    first.flush()
    assert UsageLedger(open_store(), days=3, clock=clock).rows() == both
    assert dict(first.tokens_today()) == {"acme": 57}
    clock.now += DAY_S
    first.add("acme", "a", 1, 0)
    assert first.rows(days=1) == [UsageRow("acme", "a", 1, 1, 0)]
    assert first.rows()[1].requests == 3
    clock.now += 2 * DAY_S
    assert first.rows() == [UsageRow("acme", "a", 1, 1, 0)]
    assert first.since == (DAY + 1) * DAY_S


class Failing:
    """A store that adds, and now and then says that it did not; or does not."""

    def __init__(self, store, outcomes) -> None:
        self._store, self._outcomes = store, iter(outcomes)

    def add(self, *arguments) -> None:
        outcome = next(self._outcomes, "fine")
        if outcome != "lost":
            self._store.add(*arguments)
        if outcome != "fine":
            raise ServiceError("away")

    def read(self, since):
        return self._store.read(since)


@given(
    st.lists(st.sampled_from(["fine", "lost", "answer lost"])),
    st.lists(st.one_of(st.none(), st.integers(0, 9))),
)
def test_whatever_fails_each_request_counts_once(outcomes, steps):
    """None flushes; a number is a request of so many tokens."""
    ledger = UsageLedger(Failing(SqliteUsageStore(":memory:"), outcomes), clock=Clock())

    def flush() -> bool:
        try:
            ledger.flush()
        except ServiceError:
            return False
        return True

    for step in steps:
        if step is None:
            flush()
        else:
            ledger.add("t", None, step, 0)
    while not flush():
        pass
    numbers = [step for step in steps if step is not None]
    wanted = [UsageRow("t", None, len(numbers), sum(numbers), 0)] if numbers else []
    assert ledger.rows() == wanted


def test_tokens_of_the_day_outlive_a_restart():
    asyncio.run(_over_midnight())


async def _over_midnight():
    clock = Clock()
    limiter = MemoryLimiter(clock=clock, used_today={"acme": 80})
    quotas = Quotas(tokens_per_day=100)
    refusal = await limiter.admit("acme", "r", quotas, 21)
    assert refusal is not None
    assert refusal.quota == "tokens_per_day"
    assert await limiter.admit("acme", "r", quotas, 20) is None
    clock.now += DAY_S
    assert await limiter.admit("acme", "s", quotas, 100) is None


def test_what_cannot_be_opened_or_reached(tmp_path):
    (tmp_path / "f").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="cannot be opened"):
        SqliteUsageStore(tmp_path / "f")
    with pytest.raises(ConfigError, match="redis_url"):
        RedisUsageStore("http://127.0.0.1")
    away = RedisUsageStore("redis://127.0.0.1:1/0")
    with pytest.raises(ServiceError, match="Redis"):
        away.add("1", ONE, 0)
    with pytest.raises(ServiceError, match="Redis"):
        away.read(0)
