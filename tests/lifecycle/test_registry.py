"""The registry: versions count up, nothing acknowledged is lost, reads touch no disk."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.errors import ConfigError, ConflictError, RequestError, ServiceError
from manyhats.lifecycle.database import _MIGRATIONS
from manyhats.lifecycle.records import AdapterRecord, check_name, split_version
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.routes import Route
from manyhats.lifecycle.tables import composition_of
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    Composition,
    CompositionKind,
    Digest,
    TenantId,
)

OTHER = TenantId("other")


def digest(number: int) -> Digest:
    return Digest(f"{number:064x}")


def add(
    registry: Registry, name: str, number: int, tenant: TenantId = DEFAULT_TENANT
) -> AdapterRef:
    return registry.add(
        name, digest(number), tenant=tenant, family="lora", max_rank=4, nbytes=99, source="/x"
    )


def resolve(registry: Registry, model: str, tenant: TenantId) -> AdapterRecord | None:
    """What a name (its stable version) or name@version stands for."""
    name, version = split_version(model)
    entry = registry.entry(name)
    if entry is None or entry.versions[0].tenant != tenant:
        return None
    return entry.find(entry.route.stable if version is None else version)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(path):
    registry = Registry(path, max_versions=5, clock=lambda: 1700000000.9)
    yield registry
    registry.close()


def test_versions_count_up_and_the_same_content_is_the_same_version(registry):
    assert add(registry, "a", 1) == AdapterRef("a", 1, digest(1))
    assert add(registry, "a", 1) == AdapterRef("a", 1, digest(1))
    assert add(registry, "a", 2) == AdapterRef("a", 2, digest(2))
    assert add(registry, "a", 1) == AdapterRef("a", 3, digest(1)), "only the newest is compared"
    assert add(registry, "b", 1) == AdapterRef("b", 1, digest(1))
    assert [str(r.ref) for r in registry.list(DEFAULT_TENANT)] == ["a@1", "a@2", "a@3", "b@1"]
    assert registry.uses(digest(1)) == 3
    assert registry.digests() == {digest(1), digest(2)}


def test_resolve(registry):
    add(registry, "a", 1)
    add(registry, "a", 2)
    record = resolve(registry, "a", DEFAULT_TENANT)
    assert record is not None
    assert (record.ref.version, record.family, record.max_rank, record.nbytes) == (2, "lora", 4, 99)
    assert (record.created, record.source, record.tenant) == (1700000000, "/x", DEFAULT_TENANT)
    for version in (1, 2):
        found = resolve(registry, f"a@{version}", DEFAULT_TENANT)
        assert found is not None
        assert found.ref == AdapterRef("a", version, digest(version))
    for model in (
        "a@3",
        "a@0",
        "a@01",
        "a@-1",
        "a@",
        "a@1 ",
        "a@1\n",
        "a@1@1",
        "b",
        "A",
        "",
        "@1",
        "a@\u0661",
    ):
        assert resolve(registry, model, DEFAULT_TENANT) is None, model


def test_another_tenants_name_is_neither_seen_nor_taken(registry):
    add(registry, "a", 1, OTHER)
    assert resolve(registry, "a", DEFAULT_TENANT) is None
    assert resolve(registry, "a@1", DEFAULT_TENANT) is None
    assert registry.list(DEFAULT_TENANT) == []
    with pytest.raises(ConflictError, match="taken"):
        add(registry, "a", 1)


def test_everything_survives_closing(path):
    registry = Registry(path, max_versions=5)
    add(registry, "a", 1)
    add(registry, "a", 2)
    add(registry, "gone", 3)
    registry.delete("gone")
    before = registry.list(DEFAULT_TENANT)
    registry.close()
    again = Registry(path, max_versions=5)
    assert again.list(DEFAULT_TENANT) == before
    assert again.uses(digest(3)) == 0
    again.close()


def test_a_deleted_names_versions_never_mean_something_else(path):
    registry = Registry(path, max_versions=5)
    add(registry, "a", 1)
    add(registry, "a", 2)
    assert [r.ref.version for r in registry.delete("a")] == [1, 2]
    assert registry.delete("a") == ()
    assert resolve(registry, "a", DEFAULT_TENANT) is None
    registry.close()
    again = Registry(path, max_versions=5)
    assert add(again, "a", 9) == AdapterRef("a", 3, digest(9))
    assert resolve(again, "a@1", DEFAULT_TENANT) is None
    again.close()


def test_the_bound_counts_versions_and_spares_what_is_there(registry):
    for number in range(5):
        add(registry, "a", number)
    with pytest.raises(ConflictError, match=r"5 adapter versions .* bound is 5 \(max_adapters\)"):
        add(registry, "b", 9)
    assert add(registry, "a", 4).version == 5, "the same content again needs no room"
    registry.delete("a")
    add(registry, "b", 9)


GOOD = ["a", "A9", "a.b-c_d", "x" * 128, "0", "a..b", "v1.2"]
BAD = [
    "", "x" * 129, "x" * 200, ".a", "-a", "_a", "a/b", "../a", "..", "a@1", "a b", "a\n", "a\x00",
    "é", "\uff41", "a\u202eb", "a%2fb", "a\\b", "a:b", "~",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_names_that_are_allowed(registry, name):
    assert add(registry, name, 1).name == name


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_are_not(registry, name):
    with pytest.raises(RequestError, match="is not allowed: 1 to 128 characters") as caught:
        add(registry, name, 1)
    assert caught.value.param == "name"
    assert len(caught.value.message) < 1000
    with pytest.raises(RequestError):
        check_name(name)
    assert registry.list(DEFAULT_TENANT) == []


def test_reads_touch_no_disk(registry):
    add(registry, "a", 1)
    calls = []
    registry.store._db.set_trace_callback(calls.append)
    assert resolve(registry, "a", DEFAULT_TENANT) is not None
    assert resolve(registry, "b", DEFAULT_TENANT) is None
    registry.list(DEFAULT_TENANT)
    registry.entry("a")
    assert calls == []
    add(registry, "a", 2)
    assert calls, "the trace sees what there is to see"


def test_commits_wait_for_the_disk(registry):
    assert registry.store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert registry.store._db.execute("PRAGMA synchronous").fetchone() == (2,), "2 is FULL"


def test_a_write_that_fails_changes_nothing(path):
    registry = Registry(path, max_versions=5)
    add(registry, "a", 1)
    registry.store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(ServiceError, match="the registry cannot be written"):
        add(registry, "a", 2)
    with pytest.raises(ServiceError, match="the registry cannot be written"):
        registry.delete("a")
    assert [str(r.ref) for r in registry.list(DEFAULT_TENANT)] == ["a@1"]
    registry.store._db.execute("PRAGMA query_only = OFF")
    assert add(registry, "a", 3).version == 2
    registry.close()


def test_one_process_owns_the_file(registry, path):
    with pytest.raises(ConfigError, match="in use by another server"):
        Registry(path, max_versions=5)


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 4096]
)
def test_a_file_that_is_no_registry_is_refused(path, content):
    path.write_bytes(content)
    for _ in range(2):  # the lock is free again after a refusal
        with pytest.raises(ConfigError, match=r"registry\.sqlite cannot be opened"):
            Registry(path, max_versions=5)
    assert path.read_bytes() == content


def test_virtual_tokens_are_kept(path):
    registry = Registry(path, max_versions=5)
    ref = registry.add(
        "p", digest(1), tenant=DEFAULT_TENANT, family="prefix", max_rank=0, nbytes=9, source="s",
        virtual_tokens=20,
    )  # fmt: skip
    assert ref == AdapterRef("p", 1, digest(1), 20)
    registry.close()
    again = Registry(path, max_versions=5)
    assert [r.ref for r in again.list(DEFAULT_TENANT)] == [ref]
    again.close()


def test_a_registry_of_the_first_format_is_brought_up(path):
    with sqlite3.connect(path) as db:
        for statement in _MIGRATIONS[0]:
            db.execute(statement)
        db.execute("INSERT INTO names VALUES ('a', 4), ('gone', 1)")
        row = "INSERT INTO adapters VALUES ('a', ?, ?, 'default', 'lora', 4, 99, 17, '/x')"
        db.executemany(row, [(3, digest(1)), (4, digest(2))])
        db.execute("PRAGMA user_version = 1")
    db.close()
    for _ in range(2):
        again = Registry(path, max_versions=5)
        assert [r.ref for r in again.list(DEFAULT_TENANT)] == [
            AdapterRef("a", 3, digest(1), 0),
            AdapterRef("a", 4, digest(2), 0),
        ]
        entry = again.entry("a")
        assert entry is not None
        assert entry.route == Route(4), "a name has meant its newest version so far"
        assert {(r.state, r.actor, r.revision) for r in entry.versions} == {("checked", "", "")}
        key = again.draw_key
        again.close()
    again = Registry(path, max_versions=5)
    assert add(again, "a", 3) == AdapterRef("a", 5, digest(3))
    assert len(key) == 32
    assert again.draw_key == key
    again.close()


def test_a_composition_of_the_tables_is_read():
    stack = f'{{"kind":"stack","members":[["b",1,"{digest(1)}",3,null]]}}'
    rows = [["a", 2, digest(2), 0, 0.7], ["s", 4, digest(3), 3, 3.0, stack]]
    found = composition_of(json.dumps({"kind": "ensemble", "members": rows}))
    inner = Composition(CompositionKind.STACK, (AdapterRef("b", 1, digest(1), 3),))
    members = (AdapterRef("a", 2, digest(2)), AdapterRef("s", 4, digest(3), 3, inner))
    assert found == Composition(CompositionKind.ENSEMBLE, members, (0.7, 3.0))


def test_a_newer_format_is_refused(path):
    Registry(path, max_versions=5).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for _ in range(2):
        with pytest.raises(ConfigError, match="has format 99, this server knows 6"):
            Registry(path, max_versions=5)


def test_threads_get_versions_of_their_own(path):
    registry = Registry(path, max_versions=1000)
    barrier, refs = threading.Barrier(6), []

    def work(seed):
        barrier.wait()
        for i in range(10):
            refs.append(add(registry, "a", 1000 * seed + i))
            assert resolve(registry, "a", DEFAULT_TENANT) is not None

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.version for r in refs) == list(range(1, 61))
    assert {r.ref for r in registry.list(DEFAULT_TENANT)} == set(refs)
    registry.close()


KILLED = """
import sys
from pathlib import Path
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.routes import Route
from manyhats.lifecycle.tables import composition_of
from manyhats.types import DEFAULT_TENANT, Digest

registry = Registry(Path(sys.argv[1]), max_versions=10**6)
number = int(sys.argv[2])
while True:
    number += 1
    name = f"n{number % 7}"
    if number % 5 == 0:
        gone = registry.delete(name)
        print("deleted", name, flush=True)
    else:
        ref = registry.add(name, Digest(f"{number:064x}"), tenant=DEFAULT_TENANT,
                           family="lora", max_rank=1, nbytes=1, source="s")
        print("added", ref, ref.digest, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(path):
    """A process adds and deletes in a loop and is killed in the midst of it, five times over."""
    state: dict[str, dict[str, str]] = {}
    for round_ in range(5):
        lines = _run_and_kill(path, start=round_ * 100_000, after=40 + 13 * round_)
        assert len(lines) >= 40
        for line in lines:
            verb, *words = line.split()
            if verb == "added":
                state.setdefault(words[0].split("@")[0], {})[words[0]] = words[1]
            else:
                state[words[0]] = {}
        registry = Registry(path, max_versions=10**6)
        kept = {str(r.ref): str(r.ref.digest) for r in registry.list(DEFAULT_TENANT)}
        registry.close()
        acknowledged = {ref: d for refs in state.values() for ref, d in refs.items()}
        # The one operation on its way at the kill may have happened or not.
        number = round_ * 100_000 + len(lines) + 1
        touched = f"n{number % 7}@"
        certain = {ref: d for ref, d in acknowledged.items() if not ref.startswith(touched)}
        assert {ref: d for ref, d in kept.items() if not ref.startswith(touched)} == certain
        own = {ref: d for ref, d in acknowledged.items() if ref.startswith(touched)}
        now = {ref: d for ref, d in kept.items() if ref.startswith(touched)}
        extra = {ref: d for ref, d in now.items() if ref not in own}
        if number % 5 == 0:
            assert now in ({}, own)
        else:
            assert {ref: d for ref, d in now.items() if ref in own} == own
            assert list(extra.values()) in ([], [f"{number:064x}"])
        for ref in list(own):
            if ref not in now:
                del state[ref.split("@")[0]][ref]
        for ref, d in extra.items():
            state.setdefault(ref.split("@")[0], {})[ref] = d


def _run_and_kill(path: Path, *, start: int, after: int) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(path), str(start)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    return [line.strip() for line in lines if line.endswith("\n")]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("add"), st.sampled_from("abc"), st.integers(0, 3))))
def test_it_behaves_like_the_plainest_model_and_reopens_as_it_was(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("r") / "registry.sqlite"
    registry = Registry(path, max_versions=10**6)
    counters: dict[str, int] = {}
    model: dict[str, list[tuple[int, Digest]]] = {}
    for step, name, number in steps:
        versions = model.setdefault(name, [])
        if step == "d":
            assert [r.ref.version for r in registry.delete(name)] == [v for v, _ in versions]
            versions.clear()
        else:
            ref = add(registry, name, number)
            if not versions or versions[-1][1] != digest(number):
                counters[name] = counters.get(name, 0) + 1
                versions.append((counters[name], digest(number)))
            assert (ref.version, ref.digest) == versions[-1]
    expected = [AdapterRef(n, v, d) for n in sorted(model) for v, d in model[n]]
    assert [r.ref for r in registry.list(DEFAULT_TENANT)] == expected
    registry.close()
    again = Registry(path, max_versions=10**6)
    assert [r.ref for r in again.list(DEFAULT_TENANT)] == expected
    again.close()
