"""The host tier: bounded, least recently used first out, one load at a time for a digest."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.host import HostCache
from manyhats.adapters.parts import CompiledAdapter, SiteParts
from manyhats.errors import AdapterLoadError
from manyhats.types import Digest

A, B, C, D = (Digest(letter * 64) for letter in "abcd")
WAIT_S = 20


def adapter(digest: Digest, nbytes: int) -> CompiledAdapter:
    bias = torch.zeros(nbytes, dtype=torch.uint8)
    return CompiledAdapter(digest=digest, family="lora", sites={"s": SiteParts(bias=bias)})


class Disk:
    """Counts loads; each may be held up or made to fail."""

    def __init__(self, sizes: dict[Digest, int]) -> None:
        self.sizes = sizes
        self.loads: Counter[Digest] = Counter()
        self.error: Exception | None = None
        self.gate: threading.Event | None = None
        self.reached = threading.Event()

    def load(self, digest: Digest) -> CompiledAdapter:
        self.loads[digest] += 1
        self.reached.set()
        if self.gate is not None:
            assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return adapter(digest, self.sizes[digest])


@pytest.fixture
def disk():
    return Disk({A: 40, B: 40, C: 40, D: 101})


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_the_least_recently_used_leaves_first(disk):
    evicted = []
    cache = HostCache(100, disk.load, evicted.append)
    assert cache.get(A).digest == A
    cache.get(B)
    cache.get(A)
    assert cache.get(C).nbytes == 40
    assert evicted == [B]
    assert (A in cache, B in cache, C in cache) == (True, False, True)
    assert cache.bytes_used == 80
    assert disk.loads == {A: 1, B: 1, C: 1}


def test_one_larger_than_everything_is_refused_with_both_numbers(disk):
    evicted = []
    cache = HostCache(100, disk.load, evicted.append)
    cache.get(A)
    with pytest.raises(AdapterLoadError, match=r"takes 101 bytes.*has 100 \(host_cache_mb\)"):
        cache.get(D)
    assert (cache.bytes_used, evicted) == (40, []), "the others stay"


def test_it_may_be_filled_to_the_last_byte(disk):
    cache = HostCache(80, disk.load)
    cache.get(A)
    cache.get(B)
    assert cache.bytes_used == 80
    assert A in cache


def test_concurrent_callers_share_one_load(disk, pool):
    disk.gate = threading.Event()
    cache = HostCache(100, disk.load)
    first = pool.submit(cache.get, A)
    assert disk.reached.wait(WAIT_S)
    others = [pool.submit(cache.get, A) for _ in range(10)]
    disk.gate.set()
    results = [f.result(WAIT_S) for f in (first, *others)]
    assert all(result is results[0] for result in results)
    assert disk.loads[A] == 1


def test_a_load_holds_up_no_other(disk, pool):
    cache = HostCache(100, disk.load)
    cache.get(B)
    disk.gate = threading.Event()
    disk.reached.clear()
    slow = pool.submit(cache.get, A)
    assert disk.reached.wait(WAIT_S)
    assert cache.get(B).digest == B
    assert not slow.done()
    disk.gate.set()
    slow.result(WAIT_S)


def test_a_failed_load_reaches_all_who_wait_and_is_not_remembered(disk, pool):
    disk.gate = threading.Event()
    disk.error = AdapterLoadError("the disk")
    cache = HostCache(100, disk.load)
    first = pool.submit(cache.get, A)
    assert disk.reached.wait(WAIT_S)
    second = pool.submit(cache.get, A)
    disk.gate.set()
    for future in (first, second):
        assert str(future.exception(WAIT_S)) == "the disk"
    disk.error = None
    assert cache.get(A).digest == A


def test_what_is_held_is_not_evicted_and_a_load_waits_for_it(disk, pool):
    evicted = []
    cache = HostCache(100, disk.load, evicted.append)
    with cache.hold(A) as held:
        assert held.digest == A
        cache_b = pool.submit(cache.get, B)
        cache_b.result(WAIT_S)
        pool.submit(cache.get, C).result(WAIT_S)
        assert evicted == [B], "A is older, and held"
    cache.get(A)
    cache.get(B)
    assert evicted == [B, C]


def test_a_load_waits_where_everything_is_held(disk, pool):
    cache = HostCache(100, disk.load)
    release_a, release_b = threading.Event(), threading.Event()
    held = threading.Barrier(3)

    def hold(digest, release):
        with cache.hold(digest):
            held.wait(WAIT_S)
            assert release.wait(WAIT_S)

    holders = [pool.submit(hold, A, release_a), pool.submit(hold, B, release_b)]
    held.wait(WAIT_S)
    disk.reached.clear()
    third = pool.submit(cache.get, C)
    assert disk.reached.wait(WAIT_S)
    assert cache.bytes_used == 80
    assert not third.done()
    release_b.set()
    assert third.result(WAIT_S).digest == C
    assert (A in cache, B in cache) == (True, False)
    release_a.set()
    for holder in holders:
        holder.result(WAIT_S)
    assert cache.bytes_used == 80


def test_waiters_who_hold_share_the_load_and_its_pin(disk, pool):
    disk.gate = threading.Event()
    cache = HostCache(40, disk.load)
    inside, leave = threading.Barrier(4), threading.Event()

    def hold():
        with cache.hold(A) as got:
            inside.wait(WAIT_S)
            assert leave.wait(WAIT_S)
            return got

    holders = [pool.submit(hold) for _ in range(3)]
    assert disk.reached.wait(WAIT_S)
    disk.gate.set()
    inside.wait(WAIT_S)
    waiting = pool.submit(cache.get, B)
    leave.set()
    assert len({id(h.result(WAIT_S)) for h in holders}) == 1
    waiting.result(WAIT_S)
    assert disk.loads == {A: 1, B: 1}


def test_a_thread_that_holds_may_ask_for_nothing_else(disk):
    cache = HostCache(100, disk.load)
    cache.get(B)
    with cache.hold(A):
        for ask in (cache.get, lambda d: cache.hold(d).__enter__()):
            with pytest.raises(RuntimeError, match="this thread holds"):
                ask(B)
    assert cache.get(B).digest == B


def test_a_hold_ends_with_an_exception(disk):
    cache = HostCache(40, disk.load)
    with pytest.raises(ZeroDivisionError), cache.hold(A):
        raise ZeroDivisionError
    assert cache.get(B).digest == B
    assert A not in cache


def test_drop_forgets_and_the_next_call_loads_anew(disk):
    evicted = []
    cache = HostCache(100, disk.load, evicted.append)
    cache.get(A)
    cache.drop(A)
    cache.drop(B)
    assert (A in cache, cache.bytes_used, evicted) == (False, 0, [])
    cache.get(A)
    assert disk.loads[A] == 2


def test_drop_while_held_counts_the_bytes_until_the_hold_ends(disk, pool):
    cache = HostCache(100, disk.load)
    with cache.hold(A):
        cache.drop(A)
        assert A not in cache
        assert cache.bytes_used == 40
        pool.submit(cache.get, A).result(WAIT_S)
        assert cache.bytes_used == 80, "the old copy and the new one"
    assert cache.bytes_used == 40


def test_drop_while_loading_keeps_nothing(disk, pool):
    disk.gate = threading.Event()
    cache = HostCache(100, disk.load)
    loading = pool.submit(cache.get, A)
    assert disk.reached.wait(WAIT_S)
    cache.drop(A)
    disk.gate.set()
    assert loading.result(WAIT_S).digest == A
    assert (A in cache, cache.bytes_used) == (False, 0)


def test_drop_while_loading_for_a_hold_counts_until_it_ends(disk, pool):
    disk.gate = threading.Event()
    cache = HostCache(100, disk.load)
    used = []

    def hold():
        with cache.hold(A):
            used.append(cache.bytes_used)

    holding = pool.submit(hold)
    assert disk.reached.wait(WAIT_S)
    cache.drop(A)
    disk.gate.set()
    holding.result(WAIT_S)
    assert used == [40]
    assert (A in cache, cache.bytes_used) == (False, 0)


def test_what_is_put_makes_room_among_what_nobody_holds(disk):
    evicted = []
    cache = HostCache(100, disk.load, evicted.append)
    cache.get(A)
    with cache.hold(B):
        cache.put(C, adapter(C, 50))
        assert evicted == [A]
        assert (C in cache, cache.bytes_used) == (True, 90)
        cache.put(A, adapter(A, 61))  # beside B that would be too much
        assert (A in cache, C in cache, cache.bytes_used) == (False, True, 90)
        cache.put(D, adapter(D, 101))
        cache.drop(B)
        cache.put(A, adapter(A, 61))  # B's bytes count until the hold ends
        assert (A in cache, C in cache, cache.bytes_used) == (False, True, 90)
    cache.put(A, adapter(A, 50))
    assert (A in cache, C in cache, cache.bytes_used) == (True, True, 100)
    assert cache.get(A).nbytes == 50
    assert evicted == [A]
    assert disk.loads == {A: 1, B: 1}


def test_what_is_here_or_on_its_way_is_not_put(disk, pool):
    cache = HostCache(100, disk.load)
    first = cache.get(A)
    cache.put(A, adapter(A, 40))
    assert cache.get(A) is first
    disk.gate, disk.reached = threading.Event(), threading.Event()
    loading = pool.submit(cache.get, B)
    assert disk.reached.wait(WAIT_S)
    cache.put(B, adapter(B, 60))
    assert (B in cache, cache.bytes_used) == (False, 40)
    disk.gate.set()
    assert loading.result(WAIT_S).nbytes == 40


def test_an_equal_adapter_takes_the_others_place(disk):
    cache = HostCache(100, disk.load)
    other = adapter(A, 40)
    with cache.hold(A) as held:
        cache.replace(A, lambda _: other)
        assert held is not other
    assert cache.get(A) is other
    assert cache.replace(A, lambda _: pytest.fail("A has been replaced")) == 0
    cache.replace(B, lambda _: pytest.fail("B is not here"))
    cache.put(B, adapter(B, 40))
    assert cache.replace(B, lambda _: pytest.fail("B came back as it should be")) == 0
    cache.drop(B)
    assert (disk.loads[A], cache.bytes_used, B in cache) == (1, 40, False)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    calls=st.lists(st.tuples(st.sampled_from("ghdp"), st.integers(0, 5)), max_size=60),
)
def test_it_is_an_lru_by_bytes(sizes, calls):
    """Against the plainest model: a list of (digest, bytes), oldest first."""
    capacity = 100
    digests = [Digest(f"{i:064x}") for i in range(len(sizes))]
    disk = Disk(dict(zip(digests, sizes, strict=True)))
    evicted: list[Digest] = []
    cache = HostCache(capacity, disk.load, evicted.append)
    model: list[Digest] = []
    expected: list[Digest] = []
    for call, index in calls:
        digest = digests[index % len(digests)]
        if call == "d":
            cache.drop(digest)
            model = [d for d in model if d != digest]
        elif call == "p" and digest in model:
            cache.put(digest, adapter(digest, disk.sizes[digest]))  # stays where it is in the line
        else:
            if digest in model:
                model.remove(digest)
            while sum(disk.sizes[d] for d in model) + disk.sizes[digest] > capacity:
                expected.append(model.pop(0))
            model.append(digest)
            if call == "p":
                cache.put(digest, adapter(digest, disk.sizes[digest]))
            elif call == "g":
                assert cache.get(digest).digest == digest
            else:
                with cache.hold(digest) as held:
                    assert held.nbytes == disk.sizes[digest]
        assert [d for d in digests if d in cache] == [d for d in digests if d in model]
        assert cache.bytes_used == sum(disk.sizes[d] for d in model) <= capacity
    assert evicted == expected


def test_many_threads_never_pass_the_bound_nor_lose_a_byte():
    digests = [Digest(f"{i:064x}") for i in range(12)]
    disk = Disk({d: 10 + i for i, d in enumerate(digests)})
    cache = HostCache(70, disk.load)
    start = threading.Barrier(8)
    over = []

    def work(seed):
        start.wait(WAIT_S)
        for i in range(150):
            digest = digests[(seed * 7 + i * i) % len(digests)]
            if i % 11 == 10:
                cache.drop(digest)
                continue
            with cache.hold(digest) as held:
                used = cache.bytes_used
                if held.digest != digest or not held.nbytes <= used <= 70:
                    over.append((digest, used))

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, seed) for seed in range(8)]:
            done.result(60)
    assert over == []
    assert cache.bytes_used == sum(disk.sizes[d] for d in digests if d in cache)
    for digest in digests:
        cache.drop(digest)
    assert cache.bytes_used == 0
