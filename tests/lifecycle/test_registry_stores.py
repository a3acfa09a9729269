"""One contract over both stores of the registry: embedded, and a real Redis."""

from __future__ import annotations

import json
import random
import signal
import threading
from dataclasses import replace

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from support.redis_server import RedisServer

from manyhats.errors import ConfigError, ConflictError, ManyhatsError, ServiceError
from manyhats.lifecycle.audit import Cause, broken_link, following
from manyhats.lifecycle.documents import FORMAT, NameDocument, decode, encode
from manyhats.lifecycle.following import Follower
from manyhats.lifecycle.records import AdapterRecord
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.routes import Canary, Route, Schedule, promoted
from manyhats.lifecycle.states import Demands, Require, State, Verdict
from manyhats.lifecycle.store import Head, StaleHeadError
from manyhats.lifecycle.store_redis import RedisRegistryStore
from manyhats.lifecycle.store_sqlite import SqliteRegistryStore
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    Composition,
    CompositionKind,
    Digest,
    TenantId,
)

WHY = Cause("alice", "because")


def digest(number: int) -> Digest:
    return Digest(f"{number:064x}")


@pytest.fixture(params=["sqlite", "redis"])
def open_store(request, tmp_path):
    """Opens the same store again and again; a file's owner is closed before."""
    opened = []
    if request.param == "sqlite":

        def opener():
            for store in opened:
                store.close()
            opened[:] = [SqliteRegistryStore(tmp_path / "registry.sqlite")]
            return opened[-1]
    else:
        url = request.getfixturevalue("redis_url")
        with redis.Redis.from_url(url) as client:
            client.flushall()

        def opener():
            opened.append(RedisRegistryStore(url, "base"))
            return opened[-1]

    yield opener
    for store in opened:
        store.close()


@pytest.fixture
def two(redis_url):
    """Two servers' registries on one Redis."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    registries = [Registry(RedisRegistryStore(redis_url, "b"), max_versions=999) for _ in range(2)]
    yield registries
    for registry in registries:
        registry.close()


def add(registry: Registry, name: str, number: int, **more) -> AdapterRef:
    told = {"tenant": DEFAULT_TENANT, "family": "lora", "max_rank": 4, "nbytes": 9, "source": "/x"}
    return registry.add(name, digest(number), **{**told, **more})


def after(head: Head, name: str, number: int):
    end = (head.seq, head.hash)
    text = f"2026-01-01T00:00:{number:02}"
    told = {"before": {"é": [1.5, None]}, "after": {"n": number}}
    return following(end, at=text, cause=WHY, action="act", name=name, **told)


def filled(store, names="abab"):
    entries = []
    for number, name in enumerate(names):
        head = Head.of(entries[-1]) if entries else Head()
        entries.append(after(head, name, number))
        store.write(entries[-1], {name: f'{{"é":{number}}}'})
    return entries


def test_a_new_store_is_empty_and_keeps_its_key(open_store):
    store = open_store()
    assert store.head() == Head()
    assert store.read() == (Head(), {})
    assert store.audit(name=None, after=0, limit=9) == ()
    assert len(store.key) == 32
    assert open_store().key == store.key


def test_a_write_is_read_by_the_next_to_open_it(open_store):
    entries = filled(open_store())
    store = open_store()
    head = Head.of(entries[-1])
    assert store.head() == head
    assert store.read() == (head, {"a": '{"é":2}', "b": '{"é":3}'})
    assert store.read_names(["b", "c"]) == (head, {"b": '{"é":3}'})
    assert store.read_names([]) == (head, {})


def test_the_log_is_read_in_pages_and_by_name(open_store):
    store = open_store()
    entries = filled(store, "abacab")
    store.write(other := after(Head.of(entries[-1]), "ab", 7), {})
    assert store.audit(name=None, after=0, limit=100) == (*entries, other)
    assert store.audit(name=None, after=2, limit=2) == tuple(entries[2:4])
    assert store.audit(name="a", after=0, limit=100) == (entries[0], entries[2], entries[4])
    assert store.audit(name="a", after=1, limit=1) == (entries[2],)
    assert store.audit(name="ab", after=0, limit=9) == (other,)
    assert store.audit(name="x", after=0, limit=9) == ()
    assert broken_link(e.shown() for e in store.audit(name=None, after=0, limit=99))[1] is None


def test_texts_change_with_the_entry_or_not_at_all(open_store):
    store = open_store()
    first = after(Head(), "a", 1)
    store.write(first, {"a": "1"}, {"a/data": "é" * 70_000, "a/1": "one"})
    store.write(second := after(Head.of(first), "a", 2), {}, {"a/1": None, "a/2": "two"})
    with pytest.raises(StaleHeadError):
        store.write(after(Head.of(first), "a", 3), {}, {"a/2": None, "a/3": "three"})
    store = open_store()
    found = [store.text(f"a/{what}") for what in ("data", 1, 2, 3)]
    assert found == ["é" * 70_000, None, "two", None]
    assert (store.head(), store.read()[1]) == (Head.of(second), {"a": "1"})


@pytest.mark.parametrize("wrong", ["older", "newer", "another past"])
def test_an_entry_that_does_not_follow_changes_nothing(open_store, wrong):
    store = open_store()
    entries = filled(store)
    before = store.read()
    ends = {
        "older": Head.of(entries[0]),
        "newer": Head(9, entries[-1].hash),
        "another past": Head(entries[-1].seq, "f" * 64),
    }
    with pytest.raises(StaleHeadError):
        store.write(after(ends[wrong], "a", 50), {"a": "lost"})
    assert store.read() == before
    assert len(store.audit(name=None, after=0, limit=99)) == len(entries)


def test_the_same_write_again_changes_nothing(open_store):
    """As one whose answer was lost is sent again."""
    store = open_store()
    entries = filled(store)
    store.write(entries[-1], {"b": "not looked at"})
    assert store.read()[1]["b"] == '{"é":3}'
    assert store.head() == Head.of(entries[-1])


def test_a_dump_is_put_in_the_place_of_everything(open_store, tmp_path, redis_url):
    source = open_store()
    entries = filled(source)
    source.write(last := after(Head.of(entries[-1]), "b", 9), {}, {"b/1": "é", "b/data": "x"})
    entries.append(last)
    dump = source.dump()
    assert dump.texts == {"b/1": "é", "b/data": "x"}
    assert (dump.key, dump.documents) == (source.key, source.read()[1])
    assert list(dump.entries) == entries
    others = [SqliteRegistryStore(tmp_path / "o.sqlite"), RedisRegistryStore(redis_url, "other")]
    for other in others:
        first = filled(other, "xyz")[-1]
        other.write(after(Head.of(first), "y", 9), {}, {"y/1": "gone"})
        other.load(dump)
        assert other.dump() == dump
        assert (other.key, other.read()) == (source.key, source.read())
        assert other.audit(name="a", after=0, limit=9) == source.audit(name="a", after=0, limit=9)
        other.write(after(other.head(), "n", 1), {"n": "1"})
        other.close()


def plainest(steps, registry) -> dict[str, list[tuple[int, Digest]]]:
    """What the registry should hold after the steps, which are done with it."""
    counters: dict[str, int] = {}
    model: dict[str, list[tuple[int, Digest]]] = {}
    for step, name, number in steps:
        versions = model.setdefault(name, [])
        if step == "d":
            assert [r.ref.version for r in registry.delete(name)] == [v for v, _ in versions]
            versions.clear()
        elif step == "p" and versions:
            registry.change(name, "promote", WHY, lambda e, v=versions: promoted(e.route, v[0][0]))
        elif step == "a":
            ref = add(registry, name, number)
            if not versions or versions[-1][1] != digest(number):
                counters[name] = counters.get(name, 0) + 1
                versions.append((counters[name], digest(number)))
            assert (ref.version, ref.digest) == versions[-1]
    return model


STEPS = st.lists(st.tuples(st.sampled_from("aadp"), st.sampled_from("abc"), st.integers(0, 3)))


@settings(max_examples=25)
@given(STEPS, st.randoms(use_true_random=False))
def test_replicas_behave_like_the_plainest_model(redis_url, steps, draw):
    """Each step by one of two servers, which refresh when they write, or once at the end."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    stores = [RedisRegistryStore(redis_url, "base") for _ in range(3)]
    servers = [Registry(store, max_versions=10**6) for store in stores[:2]]

    class Either:
        def __getattr__(self, name):
            return getattr(draw.choice(servers), name)

    model = plainest(steps, Either())
    expected = [AdapterRef(n, v, d) for n in sorted(model) for v, d in model[n]]
    servers.append(Registry(stores[2], max_versions=10**6))
    for registry in servers:
        registry.refresh()
        assert [r.ref for r in registry.list(DEFAULT_TENANT)] == expected
        assert {e.name: e.route for e in registry.entries()} == {
            e.name: e.route for e in servers[-1].entries()
        }
        assert {d for d in map(digest, range(4)) if registry.uses(d)} == {
            r.digest for r in expected
        }
    log = servers[0].audit(limit=10**6)
    assert broken_link(entry.shown() for entry in log)[1] is None
    for registry in servers:
        registry.close()


def test_of_many_writers_each_change_is_kept_once(two):
    failures, made = [], []

    def work(number):
        draw = random.Random(number)
        try:
            for i in range(15):
                made.append(add(two[number % 2], draw.choice("ab"), 1000 * number + i))
        except ManyhatsError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for registry in two:
        registry.refresh()
        assert {r.ref for r in registry.list(DEFAULT_TENANT)} == set(made)
        for name in "ab":
            entry = registry.entry(name)
            assert [r.ref.version for r in entry.versions] == [*range(1, len(entry.versions) + 1)]
    log = two[0].audit(limit=999)
    assert broken_link(entry.shown() for entry in log) == (60, None, log[-1].hash)


def test_a_change_is_made_from_what_the_other_server_has_written(two):
    first, second = two
    add(first, "a", 1, tenant=TenantId("acme"))
    with pytest.raises(ConflictError, match="taken"):
        add(second, "a", 2)
    add(first, "b", 1)
    add(first, "b", 2)
    first.change("b", "promote", WHY, lambda e: promoted(e.route, 1))
    assert second.change("b", "promote", WHY, lambda e: promoted(e.route, 2)).previous == 1
    member = second.entry("b").versions[0].ref
    whole = Composition(CompositionKind.STACK, (member,))
    add(first, "c", 9, composition=whole)
    with pytest.raises(ConflictError, match="is a member"):
        second.delete("b", 1)
    first.delete("c")
    second.delete("b", 1)
    with pytest.raises(ConflictError, match="changed meanwhile"):
        add(first, "c", 9, composition=whole)


def test_what_comes_and_goes_elsewhere_is_told(two):
    first, second = two
    told = []
    second.follow(told.append)
    ref = add(first, "a", 1)
    add(first, "b", 1)
    second.refresh()
    assert [(d.added, d.gone) for d in told] == [((AdapterRef("b", 1, digest(1)),), ())]
    first.delete("b")
    first.change("a", "rollback", WHY, lambda e: promoted(e.route, 0))
    second.refresh()
    assert len(told) == 1, "the content is still there"
    first.delete("a")
    second.refresh()
    assert [d.gone for d in told[1:]] == [(ref,)]
    second.refresh()
    assert len(told) == 2


def test_a_follower_is_woken_by_whoever_writes(two):
    first, second = two
    seen = threading.Event()
    second.follow(lambda difference: seen.set())
    with Follower(second).following():
        add(first, "a", 1)
        assert seen.wait(30)
    assert second.entry("a") is not None


def test_a_restored_registry_is_read_anew(two):
    """The log is another one: what is known of it is no part of its past."""
    first, second = two
    add(first, "a", 1)
    dump = first.store.dump()
    add(first, "b", 2)
    second.refresh()
    first.store.load(dump)
    for registry in two:
        registry.refresh()
        assert [e.name for e in registry.entries()] == ["a"]
    add(second, "c", 3)
    first.refresh()
    assert [e.name for e in first.entries()] == ["a", "c"]


def test_an_emptied_redis_is_no_empty_registry(two, redis_url):
    first, second = two
    add(first, "a", 1)
    second.refresh()
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    for registry in two:
        with pytest.raises(ServiceError, match="restore it from a backup"):
            registry.refresh()
        with pytest.raises(ServiceError, match="restore it from a backup"):
            add(registry, "b", 2)
        assert [e.name for e in registry.entries()] == ["a"]


def test_a_dead_and_a_stopped_redis(tmp_path):
    """Reads go on, changes fail and say so, and all is there once it is back."""
    server = RedisServer(tmp_path, persistent=True)
    server.start()
    try:
        first, second = (
            Registry(RedisRegistryStore(server.url, "b"), max_versions=99) for _ in range(2)
        )
        add(first, "a", 1)
        second.refresh()
        for number, (away, back) in enumerate(
            [
                (lambda: server.stop(signal.SIGKILL), server.start),
                (server.pause, server.resume),
            ]
        ):
            away()
            for registry in (first, second):
                with pytest.raises(ServiceError, match="Redis"):
                    registry.change("a", "rollback", WHY, lambda e: promoted(e.route, 0))
                assert registry.entry("a").route.stable != 0
            back()
            add(first, "a", 10 + number)
            second.refresh()
            assert second.entry("a") == first.entry("a")
        log = second.audit()
        assert broken_link(entry.shown() for entry in log)[:2] == (3, None)
        first.close()
        second.close()
    finally:
        server.stop()


def test_a_document_holds_all_that_is_kept_of_a_name():
    member = AdapterRef("m", 3, digest(3), 7)
    whole = Composition(
        CompositionKind.WEIGHTED, (member, AdapterRef("n", 1, digest(4))), (0.1, -2)
    )
    record = AdapterRecord(
        AdapterRef("a", 2, digest(5), 9, whole), TenantId("t"), "weighted", 4, 10**12, 17, "é",
        State.RETIRED, "alice", "r1", {"k": "v"}, 99,
        Verdict(5, False, True, {"m": None, "n": 0.1}, ("m undefined",)), "f" * 64,
    )  # fmt: skip
    schedule = Schedule((5.0, 100.0), 0.1, 1, 1e9 + 1 / 3, "held")
    for route in (Route(0), Route(2, 0), Route(1, None, Canary(2, 0.3, schedule))):
        demands = Demands({"calibration_error": None, "rules_kept": 0.5}, Require.READY)
        document = NameDocument(FORMAT, 7, (record,), route, demands, 12)
        assert decode("a", encode(document)) == document
    assert decode("a", encode(NameDocument(last_version=3))) == NameDocument(last_version=3)


def test_a_document_written_before_a_field_came_has_its_default():
    record = AdapterRecord(AdapterRef("a", 1, digest(1)), DEFAULT_TENANT, "lora", 4, 9, 1, "s")
    old = json.loads(encode(NameDocument(FORMAT, 1, (record,), Route(1))))
    del old["demands"], old["began"]
    for field in ("verdict", "since", "metadata", "revision", "actor", "state"):
        del old["versions"][0][field]
    del old["route"]["canary"], old["versions"][0]["ref"]["composition"]
    old["versions"][0]["of a later server"] = 1
    assert decode("a", json.dumps(old)) == NameDocument(FORMAT, 1, (record,), Route(1))


def test_versions_of_the_first_format_were_never_said_to_be_evaluated():
    """It called every version in use ready."""
    record = AdapterRecord(AdapterRef("a", 1, digest(1)), DEFAULT_TENANT, "lora", 4, 9, 1, "s")
    retired = replace(record, ref=AdapterRef("a", 2, digest(2)), state=State.RETIRED)
    old = NameDocument(1, 2, (replace(record, state=State.READY), retired), Route(1))
    found = decode("a", encode(old))
    assert found == NameDocument(FORMAT, 2, (record, retired), Route(1), began=2**62)


def test_a_document_of_a_newer_format_is_refused(tmp_path):
    store = SqliteRegistryStore(tmp_path / "r.sqlite")
    store.write(after(Head(), "a", 1), {"a": json.dumps({"format": FORMAT + 1})})
    with pytest.raises(ConfigError, match=r"'a' has format 3, this server knows 2"):
        Registry(store, max_versions=5)
    for text in ("{", "[]", '{"versions": [{}]}'):
        with pytest.raises(ServiceError, match="cannot be read"):
            decode("a", text)


def test_a_bad_address_is_refused():
    with pytest.raises(ConfigError, match="redis_url"):
        RedisRegistryStore("http://127.0.0.1", "b")
    with pytest.raises(ServiceError, match="Redis"):
        RedisRegistryStore("redis://127.0.0.1:1/0", "b")
