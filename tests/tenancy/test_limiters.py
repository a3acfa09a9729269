"""One contract over both limiters: in memory, and in a real Redis. And the pure arithmetic."""

from __future__ import annotations

import asyncio

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from manyhats.errors import ConfigError
from manyhats.tenancy import quota
from manyhats.tenancy.limiter import MemoryLimiter
from manyhats.tenancy.limiter_redis import RedisLimiter
from manyhats.tenancy.model import Quotas
from manyhats.tenancy.quota import Account, Refusal

NOON = 20_000 * 86_400.0 + 43_200


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "redis"])
def run(request):
    """``run(story)`` awaits ``story(limiter, clock)``; ``run.open`` opens the limiter anew."""
    url = None
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        with redis.Redis.from_url(url) as client:
            client.flushall()

    def runner(story):
        async def tell():
            clock = Clock()
            limiter = RedisLimiter(url, clock=clock) if url else MemoryLimiter(clock=clock)
            try:
                await story(limiter, clock)
            finally:
                if url:
                    await limiter.close()

        asyncio.run(tell())

    return runner


def test_requests_a_minute(run):
    quotas = Quotas(requests_per_minute=3)

    async def story(limiter, clock):
        for i in range(3):
            assert await limiter.admit("t", f"r{i}", quotas, 5) is None
        refusal = await limiter.admit("t", "r3", quotas, 5)
        assert refusal == Refusal("requests_per_minute", 3, 1, pytest.approx(20.0))
        assert await limiter.admit("u", "r3", quotas, 5) is None, "another tenant's is its own"
        clock.now += refusal.retry_after_s - 0.5
        assert (await limiter.admit("t", "r4", quotas, 5)).retry_after_s == pytest.approx(0.5)
        clock.now += 0.5
        assert await limiter.admit("t", "r4", quotas, 5) is None
        clock.now += 3600
        burst = [await limiter.admit("t", f"s{i}", quotas, 5) for i in range(5)]
        assert [r is None for r in burst] == [True] * 3 + [False] * 2, "no more than a minute's"

    run(story)


def test_tokens_are_reserved_and_what_is_not_used_comes_back(run):
    quotas = Quotas(tokens_per_minute=100, tokens_per_day=1000)

    async def story(limiter, clock):
        assert await limiter.admit("t", "a", quotas, 90) is None
        refusal = await limiter.admit("t", "b", quotas, 40)
        assert refusal == Refusal("tokens_per_minute", 100, 40, pytest.approx(18.0))
        await limiter.settle("t", "a", quotas, 60)
        assert await limiter.admit("t", "b", quotas, 40) is None
        await limiter.settle("t", "b", quotas, 40)
        await limiter.settle("t", "b", quotas, 1000)
        assert await limiter.admit("t", "c", quotas, 100) is None, "never over a minute's worth"
        assert (await limiter.admit("t", "d", quotas, 1)).quota == "tokens_per_minute"

    run(story)


def test_tokens_a_day_come_back_at_midnight(run):
    quotas = Quotas(tokens_per_day=100)

    async def story(limiter, clock):
        assert await limiter.admit("t", "a", quotas, 70) is None
        refusal = await limiter.admit("t", "b", quotas, 40)
        assert refusal == Refusal("tokens_per_day", 100, 40, 43_200.0)
        await limiter.settle("t", "a", quotas, 15)
        assert await limiter.admit("t", "c", quotas, 45) is None
        assert (await limiter.admit("t", "d", quotas, 1)).quota == "tokens_per_day"
        clock.now += 43_200
        assert await limiter.admit("t", "e", quotas, 100) is None
        await limiter.settle("t", "c", quotas, 45)

    run(story)


def test_concurrent_and_queued_requests(run):
    quotas = Quotas(concurrent_requests=3, queued_requests=2)

    async def story(limiter, clock):
        for name in ("a", "b"):
            assert await limiter.admit("t", name, quotas, 1) is None
        assert await limiter.admit("t", "c", quotas, 1) == Refusal("queued_requests", 2, 1, 1.0)
        await limiter.start("t", "a")
        assert await limiter.admit("t", "c", quotas, 1) is None
        await limiter.start("t", "b")
        await limiter.start("t", "b")
        assert await limiter.admit("t", "d", quotas, 1) == Refusal("concurrent_requests", 3, 1, 1.0)
        await limiter.settle("t", "c", quotas, 0)
        await limiter.settle("t", "c", quotas, 0)
        assert await limiter.admit("t", "d", quotas, 1) is None
        assert (await limiter.admit("t", "e", quotas, 1)).quota == "concurrent_requests"

    run(story)


def test_a_refused_request_takes_nothing(run):
    quotas = Quotas(requests_per_minute=2, tokens_per_minute=10, concurrent_requests=2)

    async def story(limiter, clock):
        assert await limiter.admit("t", "a", quotas, 8) is None
        for _ in range(5):
            assert (await limiter.admit("t", "b", quotas, 5)).quota == "tokens_per_minute"
        assert await limiter.admit("t", "c", quotas, 2) is None

    run(story)


def test_what_can_never_pass_says_so(run):
    async def story(limiter, clock):
        for quotas, tokens, name in (
            (Quotas(requests_per_minute=0), 1, "requests_per_minute"),
            (Quotas(concurrent_requests=0), 1, "concurrent_requests"),
            (Quotas(queued_requests=0), 1, "queued_requests"),
            (Quotas(tokens_per_minute=10), 11, "tokens_per_minute"),
            (Quotas(tokens_per_day=10), 11, "tokens_per_day"),
        ):
            refusal = await limiter.admit("t", "a", quotas, tokens)
            assert (refusal.quota, refusal.retry_after_s) == (name, None)
        assert await limiter.admit("t", "a", Quotas(), 10**9) is None

    run(story)


def test_two_servers_share_one_quota(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    quotas = Quotas(requests_per_minute=5, concurrent_requests=100)

    async def story():
        servers = [RedisLimiter(redis_url, clock=Clock()) for _ in range(2)]
        calls = [servers[i % 2].admit("t", f"r{i}", quotas, 1) for i in range(20)]
        answers = await asyncio.gather(*calls)
        for server in servers:
            await server.close()
        return sum(answer is None for answer in answers)

    assert asyncio.run(story()) == 5


def test_without_redis_each_server_keeps_its_own_account_and_says_so(caplog):
    quotas = Quotas(requests_per_minute=2)

    async def story():
        limiter = RedisLimiter("redis://127.0.0.1:1/0", clock=Clock())
        assert limiter.reachable
        answers = [await limiter.admit("t", f"r{i}", quotas, 1) for i in range(3)]
        await limiter.start("t", "r0")
        await limiter.settle("t", "r0", quotas, 1)
        assert not limiter.reachable
        await limiter.close()
        return [answer is None for answer in answers]

    assert asyncio.run(story()) == [True, True, False]
    said = [r.message for r in caplog.records if "quotas are this server's own" in r.message]
    assert len(said) == 1


def test_requests_of_a_server_that_died_are_let_go_in_time(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    quotas = Quotas(concurrent_requests=1)

    async def story():
        clock = Clock()
        limiter = RedisLimiter(redis_url, clock=clock)
        assert await limiter.admit("t", "a", quotas, 1) is None
        assert await limiter.admit("t", "b", quotas, 1) is not None
        clock.now += 3601
        assert await limiter.admit("t", "b", quotas, 1) is None
        await limiter.close()

    asyncio.run(story())


def test_a_bad_address_is_refused():
    with pytest.raises(ConfigError, match="redis_url"):
        RedisLimiter("http://127.0.0.1")


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.integers(0, 50)), max_size=60),
    st.integers(1, 100),
)
def test_no_span_of_time_gives_more_than_a_minutes_worth_and_its_time(calls, limit):
    """The bucket's promise, whatever comes when: used in any span <= limit * (1 + span / 60)."""
    account, quotas, now = Account(), Quotas(tokens_per_minute=limit), NOON
    spent: list[tuple[float, int]] = []
    for number, (gap, tokens, unused) in enumerate(calls):
        now += gap
        if quota.admit(account, quotas, f"r{number}", tokens, now) is None:
            unused = min(unused, tokens)
            quota.settle(account, quotas, f"r{number}", unused, now)
            spent.append((now, tokens - unused))
    for i, (start, _) in enumerate(spent):
        for j in range(i, len(spent)):
            total = sum(tokens for _, tokens in spent[i : j + 1])
            assert total <= limit * (1 + (spent[j][0] - start) / 60) + 1e-6
