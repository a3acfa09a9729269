"""An adapter's bytes are in one place on a CPU: on the host or in the pool's rows, and the same."""

from __future__ import annotations

import copy
import time
from collections import Counter

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import tiny_model, tiny_tokenizer
from support.random_parts import random_adapter

from manyhats.adapters.host import HostCache
from manyhats.engine.exchange import Exchange
from manyhats.engine.pool import AdapterPool
from manyhats_kernels.cpu import TorchBackend

PROMPT = [5, 9, 33, 7]
KINDS = {"a": "low_rank", "b": "low_rank", "c": "low_rank", "d": "dense"}


@pytest.fixture(scope="module")
def base():
    return base_of(copy.deepcopy(tiny_model("llama")), tiny_tokenizer())


@pytest.fixture(scope="module")
def adapters(base):
    return {n: random_adapter(k, base.spec, ord(n)) for n, k in KINDS.items()}


@pytest.fixture
def loads():
    return Counter()


@pytest.fixture
def engine(base, adapters, loads, tmp_path):
    known = {a.digest: a for a in adapters.values()}

    def load(digest):
        loads[digest] += 1
        return known[digest]

    with LocalEngine(base, tmp_path, adapters, load_adapter=load, slots=1) as engine:
        yield engine


def ask(engine, name):
    [output] = engine.generate([PROMPT], params(6, ignore_eos=True, logprobs=2), [name])
    assert output.error is None
    return output.token_ids, [t.logprob for t in output.logprobs]


def settled(engine, wanted):
    """The host tier's digests, once they are ``wanted`` (bounded; other threads bring it about)."""
    host, ends = engine.engine.residency.host, time.monotonic() + 60
    while True:
        engine.generate([PROMPT], params(1))
        found = {n for n in KINDS if engine.adapters[n].digest in host}
        if found == wanted or time.monotonic() > ends:
            return found


def test_an_adapter_is_on_the_host_or_on_the_device_and_read_from_the_disk_once(engine, loads):
    first = {}
    for name, on_host in (("a", set()), ("b", {"a"}), ("c", {"a", "b"})):
        first[name] = ask(engine, name)
        assert settled(engine, on_host) == on_host
    for name in ("b", "a", "c", "a", "b"):
        assert ask(engine, name) == first[name]
        assert settled(engine, {*"abc"} - {name}) == {*"abc"} - {name}
    assert set(loads.values()) == {1}
    host = engine.engine.residency.host
    assert host.bytes_used == engine.adapters["a"].nbytes + engine.adapters["c"].nbytes
    assert_at_rest(engine)


def test_what_cannot_be_read_back_stays_on_the_host(engine, loads):
    first = ask(engine, "d")
    ask(engine, "a")
    assert settled(engine, {"d"}) == {"d"}
    assert ask(engine, "d") == first
    assert settled(engine, {"a", "d"}) == {"a", "d"}
    assert set(loads.values()) == {1}


def test_what_is_prefetched_is_kept_in_compact_form(engine):
    residency = engine.engine.residency
    residency.prefetch(engine.ref("a"))
    assert settled(engine, {"a"}) == {"a"}
    ends = time.monotonic() + 60
    while not in_one_mapping(residency.host.get(engine.adapters["a"].digest)):
        assert time.monotonic() < ends


def test_what_came_for_a_request_that_went_away_is_kept_in_compact_form(engine):
    """It waited for the only slot; nothing else would bring it to that form."""
    assert not in_one_mapping(engine.adapters["b"])
    first = engine.submit(PROMPT, params(500, ignore_eos=True), adapter="a")
    engine.next_delta(first)
    host, digest = engine.engine.residency.host, engine.adapters["b"].digest
    second = engine.submit(PROMPT, params(4), adapter="b")
    ends = time.monotonic() + 60
    while digest not in host:
        assert time.monotonic() < ends
    engine.generate([PROMPT], params(2))  # and the step thread knows that it is there
    engine.engine.loop.abort(second)
    while not in_one_mapping(host.get(digest)):
        assert time.monotonic() < ends
    engine.engine.loop.abort(first)


def in_one_mapping(adapter):
    starts = sorted(t.data_ptr() for p in adapter.sites.values() for t in p.tensors())
    return starts[-1] - starts[0] < adapter.nbytes + 64 * len(starts)


class Tiers:
    """An exchange whose posts are run by hand."""

    def __init__(self, base, adapters):
        known = {a.digest: a for a in adapters.values()}
        self.pool = AdapterPool(
            list(base.spec.sites.values()),
            rows=64, slots=2, override_bytes=1 << 24, dtype=base.dtype,
            device=base.device, backend=TorchBackend(),
        )  # fmt: skip
        self.host = HostCache(1 << 24, known.__getitem__)
        self.posted = []
        self.exchange = Exchange(self.pool, self.host, self.posted.append)

    def place(self, adapter, slot):
        with self.host.hold(adapter.digest) as held:
            self.pool.write(slot, tuple(16 * slot for _ in self.pool.capacity), held)
        self.exchange.placed(adapter.digest, slot)


def test_what_comes_back_has_the_same_bits_and_memory_of_its_own(base, adapters):
    tiers, adapter = Tiers(base, adapters), adapters["a"]
    tiers.place(adapter, 1)
    assert adapter.digest not in tiers.host
    tiers.exchange.leaving(adapter.digest)
    tiers.exchange.take_back(adapter.digest, 1)
    tiers.place(adapters["b"], 1)  # over its rows
    [taken] = tiers.posted
    taken()
    back = tiers.host.get(adapter.digest)
    assert (back.digest, back.family, back.nbytes) == (
        adapter.digest,
        adapter.family,
        adapter.nbytes,
    )
    assert list(back.sites) == list(adapter.sites)
    for name, parts in adapter.sites.items():
        assert torch.equal(back.sites[name].low_rank.a, parts.low_rank.a)
        assert torch.equal(back.sites[name].low_rank.b, parts.low_rank.b)


def test_what_is_dropped_on_its_way_back_is_not_kept(base, adapters):
    tiers, digest = Tiers(base, adapters), adapters["a"].digest
    tiers.place(adapters["a"], 0)
    tiers.exchange.leaving(digest)
    tiers.host.drop(digest)
    tiers.exchange.dropped(digest)
    tiers.exchange.take_back(digest, 0)
    for call in tiers.posted:
        call()
    assert (digest in tiers.host, tiers.host.bytes_used) == (False, 0)
    assert tiers.pool.read(0) is None


def test_a_host_without_memory_for_it_loses_the_copy_alone(base, adapters, monkeypatch, caplog):
    tiers, digest = Tiers(base, adapters), adapters["a"].digest

    def full(_adapter):
        raise OSError(12, "Cannot allocate memory")

    tiers.place(adapters["a"], 0)
    monkeypatch.setattr("manyhats.engine.exchange.compact", full)
    tiers.exchange.leaving(digest)
    tiers.exchange.take_back(digest, 0)
    assert "is not kept on the host" in caplog.text
    assert digest not in tiers.host
    assert tiers.pool.read(0) is None
    tiers.host.get(digest)
    tiers.exchange.pack(digest)
    assert "stays as it was loaded" in caplog.text
    assert digest in tiers.host


def test_a_pool_of_another_device_or_of_other_parts_is_not_read_back(base, adapters):
    tiers = Tiers(base, adapters)
    tiers.place(adapters["d"], 0)
    assert not tiers.pool.holds_all(0)
    assert adapters["d"].digest in tiers.host
    tiers.pool._on_cpu = False
    tiers.place(adapters["a"], 1)
    assert tiers.pool.read(1) is None
    assert adapters["a"].digest in tiers.host
