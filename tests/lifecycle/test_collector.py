"""What has had its time goes with its bytes; what anybody may still need stays."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
from support.adapter_service import open_adapters, write_adapter

from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.collector import Collected, Retention
from manyhats.lifecycle.compositions import NamedComposition
from manyhats.types import DEFAULT_TENANT, CompositionKind

WHY = Cause("alice", "disk is short")
DAY_S = 86400.0


@pytest.fixture
def adapters(tmp_path):
    """``a`` with five versions, of which the third is stable and all others are retired."""
    with open_adapters(tmp_path, retention=Retention(retired_s=DAY_S)) as adapters:
        for seed in range(5):
            write_adapter(adapters.root / str(seed), seed)
            register(adapters, "a", seed)
        routes = adapters.service.rollouts
        routes.promote("a", DEFAULT_TENANT, WHY, 3)
        for version in (1, 2, 4, 5):
            routes.retire("a", DEFAULT_TENANT, WHY, version)
        adapters.service.collector._clock = lambda: 1234 + DAY_S  # the registry's is at 1234.5
        yield adapters


def register(adapters, name, seed):
    folder = str(adapters.root / str(seed))
    return adapters.service.register_folder(name, folder, tenant=DEFAULT_TENANT).ref


def collect(adapters, **more) -> list[str]:
    """The versions that go; the bytes of no other."""
    kept = adapters.registry.digests()
    found = adapters.service.collector.collect(WHY, **more)
    if not more:
        assert not kept - set(found.digests) - set(adapters.store.list())
    return [str(ref) for ref in found.versions]


def test_retired_versions_go_after_their_time(adapters):
    before = adapters.store.list()
    told = []
    adapters.service.collector.freed = told.append
    wanted = adapters.service.collector.collect(WHY, dry_run=True)
    assert [str(ref) for ref in wanted.versions] == ["a@1", "a@2", "a@4", "a@5"]
    assert adapters.store.list() == before
    size = sum(adapters.store.size(digest) for digest in wanted.digests)
    assert wanted.nbytes == size > 0
    found = adapters.service.collector.collect(WHY)
    assert found == wanted
    assert told == [found]
    assert adapters.store.list() == [adapters.registry.entry("a").versions[0].ref.digest]
    *each, total = adapters.registry.audit()[-5:]
    assert [(e.action, e.actor, e.before["versions"][0]["version"]) for e in each] == [
        ("collect", "alice", version) for version in (1, 2, 4, 5)
    ]
    assert (total.action, total.reason, total.after["bytes"]) == ("gc", "disk is short", size)
    assert {ref.digest for ref in adapters.residency.dropped} == set(found.digests)
    assert adapters.service.collector.collect(WHY) == Collected()
    assert adapters.registry.audit()[-1] == total, "nothing to do is no entry"


def test_not_before(adapters):
    adapters.service.collector._clock = lambda: 1233 + DAY_S
    assert collect(adapters) == []
    adapters.service.collector._retention = Retention()
    adapters.service.collector._clock = lambda: 10**12
    assert collect(adapters) == []


def test_what_is_routed_running_or_a_member_stays(adapters):
    routes, versions = adapters.service.rollouts, adapters.registry.entry("a").versions
    routes.retire("a", DEFAULT_TENANT, WHY, 1, retired=False)
    whole = NamedComposition(CompositionKind.STACK, ("a@1", "a@3"))
    adapters.service.register_composition("c", whole, tenant=DEFAULT_TENANT)
    routes.retire("a", DEFAULT_TENANT, WHY, 1)
    adapters.service.collector.leased = lambda: [versions[1].ref.digest]
    # A route that holds a retired version is none that the API makes; it must be safe all the same.
    entry = adapters.registry.entry("a")
    adapters.registry.change("a", "odd", WHY, lambda e: dataclasses.replace(entry.route, stable=5))
    assert collect(adapters) == ["a@4"]


def test_the_last_version_of_a_name_stays(adapters):
    routes = adapters.service.rollouts
    routes.rollback("a", DEFAULT_TENANT, WHY, 0)
    routes.retire("a", DEFAULT_TENANT, WHY, 3)
    assert collect(adapters) == ["a@1", "a@2", "a@3", "a@4"]
    assert adapters.registry.entry("a").route.stable == 0, "the base still answers"


def test_content_that_another_version_has_keeps_its_bytes(adapters):
    ref = register(adapters, "b", 0)
    assert collect(adapters) == ["a@1", "a@2", "a@4", "a@5"]
    assert ref.digest in adapters.store.list()
    assert ref not in adapters.residency.dropped


def test_bytes_of_what_is_deleted_stay_as_long_as_is_asked(tmp_path):
    now = time.time()
    with open_adapters(tmp_path, retention=Retention(deleted_s=60)) as adapters:
        write_adapter(adapters.root / "0", 0)
        ref = register(adapters, "a", 0)
        os.utime(adapters.store.path(ref.digest), (0, 0))
        adapters.service.delete("a", DEFAULT_TENANT)
        assert adapters.store.list() == [ref.digest]
        collector = adapters.service.collector
        collector._clock = lambda: now + 59
        assert collector.collect(WHY) == Collected()
        register(adapters, "a", 0)
        collector._clock = lambda: now + 999
        assert collector.collect(WHY) == Collected(), "it is a version's again"
        adapters.service.delete("a", DEFAULT_TENANT)
        assert collector.collect(WHY).digests == (ref.digest,)
        assert adapters.store.list() == []


def test_what_a_process_left_in_a_version_goes_in_time(adapters):
    folder = adapters.store.path(adapters.registry.entry("a").versions[0].ref.digest)
    (folder / ".derived-1-2.tmp").write_bytes(b"half")
    collector = adapters.service.collector
    collector._clock = time.time
    collector._retention = Retention()
    collector.collect(WHY)
    assert (folder / ".derived-1-2.tmp").exists(), "it may be written at this moment"
    collector._clock = lambda: time.time() + 3700
    collector.collect(WHY)
    assert not (folder / ".derived-1-2.tmp").exists()
