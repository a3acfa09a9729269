"""Seconds on the device and bytes, counted for the owners of adapters."""

from __future__ import annotations

import sqlite3

from manyhats.lifecycle.occupancy import Occupancy
from manyhats.lifecycle.registry import Registry
from manyhats.tenancy.usage import Counts, UsageKey, UsageLedger, UsageRow
from manyhats.tenancy.usage_sqlite import SqliteUsageStore
from manyhats.types import Composition, CompositionKind, Digest, TenantId


def test_residence_counts_for_the_owner_and_bytes_are_those_of_now(tmp_path):
    registry = Registry(tmp_path / "r.sqlite", max_versions=9)

    def add(name, number, tenant, **more):
        told = {"family": "lora", "max_rank": 4, "nbytes": number, "source": "s"}
        return registry.add(name, Digest(f"{number:064x}"), tenant=TenantId(tenant), **told, **more)

    now, sizes = [100.0], {}
    first, second = add("a", 10, "acme"), add("a", 20, "acme")
    other = add("b", 5, "beta")
    whole = Composition(CompositionKind.STACK, (first,))
    composed = add("c", 7, "acme", composition=whole)
    resident = [first, second, composed]
    usage = UsageLedger(clock=lambda: 0.0)
    occupancy = Occupancy(
        registry, lambda: resident, usage.occupied, sizes.update, clock=lambda: now[0]
    )
    usage.sizes = occupancy.sizes
    usage.add("beta", "a", 3, 4)
    for now[0] in (100.9, 103.4, 105.2):
        occupancy.tick()
    resident[:] = [other]
    now[0] = 107.0
    occupancy.tick()
    assert usage.rows() == [
        UsageRow("acme", "a", resident_s=5, nbytes=30),
        UsageRow("acme", "c", resident_s=5),
        UsageRow("beta", "a", 1, 3, 4),
        UsageRow("beta", "b", resident_s=2, nbytes=5),
    ]
    assert sizes == {"a": 30, "b": 5}
    registry.close()


def test_a_file_without_seconds_gets_them(tmp_path):
    with sqlite3.connect(tmp_path / "u") as db:
        db.execute(
            "CREATE TABLE usage (day INTEGER NOT NULL, tenant TEXT NOT NULL, adapter TEXT NOT NULL,"
            " requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, output_tokens INTEGER NOT"
            " NULL, PRIMARY KEY (day, tenant, adapter)) WITHOUT ROWID"
        )
        db.execute("INSERT INTO usage VALUES (1, 't', 'a', 1, 2, 3)")
    db.close()
    key = UsageKey(1, "t", "a")
    for seconds in (7, 14):
        store = SqliteUsageStore(tmp_path / "u")
        store.add(str(seconds), {key: Counts(resident_s=7)}, 0)
        assert store.read(0) == {key: Counts(1, 2, 3, seconds)}
        store.close()
