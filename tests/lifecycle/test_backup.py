"""A backup holds all of a base, in whatever store it is, and is put back whole or not at all."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import redis
from support.adapter_service import BASE_ID, compile_folder, open_adapters, write_adapter
from typer.testing import CliRunner

from manyhats.cli import app
from manyhats.commands import storage
from manyhats.config import Settings
from manyhats.drift.actions import Actor
from manyhats.drift.opening import FILE_NAME, open_store
from manyhats.drift.policy import Action, Latch, Policy
from manyhats.drift.store import DriftStore, scope
from manyhats.drift.validation import Validations
from manyhats.errors import AdapterLoadError, ConfigError, ServiceError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.backup import Kept
from manyhats.lifecycle.compositions import NamedComposition
from manyhats.lifecycle.documents import decode
from manyhats.lifecycle.registry import Registry
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import Grant, Role, Tenant, Visibility
from manyhats.tenancy.usage import Counts, UsageKey
from manyhats.types import DEFAULT_TENANT, CompositionKind

WHY = Cause("alice", "backup")


@pytest.fixture
def settings_in(tmp_path, redis_url):
    """Settings of a home of that name, with a Redis or not."""

    def make(name: str, *, shared: bool) -> Settings:
        more = {"redis_url": redis_url} if shared else {}
        return Settings(home=tmp_path / name, **more)

    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return make


@contextmanager
def stores(settings: Settings) -> Iterator[Kept]:
    with storage._kept(settings, BASE_ID, exclusive=True) as kept:
        yield kept


@contextmanager
def drift_of(settings: Settings) -> Iterator[tuple[DriftStore, Actor]]:
    """What drift detection keeps, and who reads and writes policies there."""
    with closing(open_store(settings, settings.base_folder(BASE_ID) / FILE_NAME)) as store:
        yield store, Actor(None, store, None, None, time.time)


def watch(settings: Settings, entries) -> None:
    """A policy that has acted, another one, an evaluation's outcome, and what is of requests."""
    a, b = entries
    latch = Latch(a.route.shown(), 1.5, 2, "rollback", "kl é")
    with drift_of(settings) as (store, actor):
        actor.set_policy(a, Policy(Action.ROLLBACK, signals=("kl",), cool_down_s=60.0))
        actor.set_policy(b, Policy(Action.HOLD, dry_run=True, revalidate_s=9.0))
        store.put(f"latch/{scope(a)}", json.dumps(latch.shown()))
        Validations(store).add(b, 1, passed=True, by="alice", figures={"x": 0.5}, at=2.0)
        for key in ("frozen/x@1/kl", "window/x@1/1", f"alarms/{scope(a)}"):
            store.put(key, "[]")


def fill(settings: Settings, tmp_path) -> None:
    """Versions, one retired, a canary, a composition, a deleted name, tenants, a key, usage, and
    what drift detection keeps.
    """
    with stores(settings) as kept:
        registry = Registry(kept.registry, max_versions=99)
        service = open_adapters(tmp_path / "made", store=kept.adapters, registry=registry)
        with service as adapters:
            for seed in range(4):
                write_adapter(adapters.root / str(seed), seed)
            for name, seed in (("a", 0), ("a", 1), ("a", 2), ("b", 3), ("gone", 0)):
                folder = str(adapters.root / str(seed))
                adapters.service.register_folder(name, folder, tenant=DEFAULT_TENANT)
            routes = adapters.service.rollouts
            routes.canary("a", DEFAULT_TENANT, WHY, version=2, percent=5)
            routes.retire("a", DEFAULT_TENANT, WHY, 1)
            whole = NamedComposition(CompositionKind.WEIGHTED, ("a", "b"), (0.5, 2))
            adapters.service.register_composition("c", whole, tenant=DEFAULT_TENANT)
            adapters.service.delete("gone", DEFAULT_TENANT)
            watch(settings, [adapters.service.entry(n, DEFAULT_TENANT) for n in ("a", "b")])
        directory = TenantDirectory(kept.tenants)
        directory.create(Tenant(id="acme", weight=2.0))
        directory.issue("acme", Role.TENANT)
        grant = Grant(
            name="a", owner=DEFAULT_TENANT, visibility=Visibility.SHARED, shared_with=("acme",)
        )
        directory.share(grant)
        kept.usage.add("1", {UsageKey(20000, "acme", "a"): Counts(1, 2, 3)}, 0)
        kept.usage.add("2", {UsageKey(20001, "acme", None): Counts(4, 5, 6)}, 0)


def everything(settings: Settings):
    with stores(settings) as kept:
        for digest in kept.adapters.list():
            kept.adapters.verified(digest)
            compile_folder(kept.adapters.open(digest))
        _, tenants = kept.tenants.read()
        drift = kept.drift.read()
        return kept.registry.dump(), kept.adapters.list(), tenants, kept.usage.read(0), drift


@pytest.mark.parametrize("shared", [False, True], ids=["sqlite", "redis"])
@pytest.mark.parametrize("out", ["b", "b.tar"])
def test_what_is_restored_is_what_was_there(settings_in, tmp_path, shared, out):
    """From each kind of store into the other one and back."""
    source, other = settings_in("one", shared=shared), settings_in("two", shared=not shared)
    fill(source, tmp_path)
    before = everything(source)
    assert len(before[1]) == 4
    assert storage.back_up(source, BASE_ID, tmp_path / out).endswith(f"4 adapters of {BASE_ID}")
    storage.put_back(other, None, tmp_path / out, replace=False)
    assert everything(other) == before
    with stores(source) as kept:
        registry = Registry(kept.registry, max_versions=99)
        registry.delete("c")
        registry.delete("b")
    storage.put_back(source, BASE_ID, tmp_path / out, replace=True)
    assert everything(source) == before
    with (
        stores(source) as kept,
        open_adapters(
            tmp_path / "made",
            store=kept.adapters,
            registry=Registry(kept.registry, max_versions=99),
        ) as again,
    ):
        assert (
            again.service.register_folder(
                "gone", str(again.root / "0"), tenant=DEFAULT_TENANT
            ).ref.version
            == 2
        ), "the counter of a deleted name was kept"


@pytest.mark.parametrize("shared", [False, True], ids=["sqlite", "redis"])
def test_policies_come_back_with_what_they_go_by(settings_in, tmp_path, shared):
    source, other = settings_in("one", shared=shared), settings_in("two", shared=not shared)
    fill(source, tmp_path)
    storage.back_up(source, BASE_ID, tmp_path / "b")
    storage.put_back(other, None, tmp_path / "b", replace=False)
    with stores(other) as kept:
        a, b = (decode(n, kept.registry.read()[1][n]).entry for n in ("a", "b"))
    with drift_of(other) as (store, actor):
        assert actor.policies() == {
            (DEFAULT_TENANT, "a"): Policy(Action.ROLLBACK, signals=("kl",), cool_down_s=60.0),
            (DEFAULT_TENANT, "b"): Policy(Action.HOLD, dry_run=True, revalidate_s=9.0),
        }
        assert actor.latch(a) == Latch(a.route.shown(), 1.5, 2, "rollback", "kl é")
        assert actor.latch(b) is None
        assert [found["at"] for found in Validations(store).series(b)] == [2.0]
        of_names = {"policy/default/a", "policy/default/b", "latch/default/a"}
        assert set(store.items("")) == of_names | {"validation/default/b"}
        actor.set_policy(b, Policy(Action.BASELINE))
        store.put("policy/default/new", store.get("policy/default/a"))
        store.put("frozen/y@1/kl", "[]")
    storage.put_back(other, None, tmp_path / "b", replace=True)
    with drift_of(other) as (store, actor):
        assert actor.policy(b) == Policy(Action.HOLD, dry_run=True, revalidate_s=9.0)
        assert set(actor.policies()) == {(DEFAULT_TENANT, "a"), (DEFAULT_TENANT, "b")}
        assert store.get("frozen/y@1/kl") == "[]", "a reference is no name's"


def test_a_backup_that_knew_no_policies_brings_none(settings_in, tmp_path):
    source, other = settings_in("one", shared=False), settings_in("two", shared=False)
    fill(source, tmp_path)
    storage.back_up(source, BASE_ID, backup := tmp_path / "b")
    (backup / "drift.json").unlink()
    with pytest.raises(ConfigError, match=r"drift\.json"):
        storage.put_back(other, BASE_ID, backup, replace=False)
    manifest = json.loads((backup / "manifest.json").read_bytes())
    del manifest["sha256"]["drift.json"]
    (backup / "manifest.json").write_text(json.dumps(manifest))
    before = everything(source)
    for settings, replace in ((other, False), (source, True)):
        storage.put_back(settings, BASE_ID, backup, replace=replace)
        assert everything(settings) == (*before[:4], {})


def test_a_registry_is_not_overwritten_unasked(settings_in, tmp_path):
    source = settings_in("one", shared=False)
    fill(source, tmp_path)
    storage.back_up(source, BASE_ID, tmp_path / "b")
    before = everything(source)
    with pytest.raises(ConfigError, match="there is a registry already"):
        storage.put_back(source, BASE_ID, tmp_path / "b", replace=False)
    with pytest.raises(ConfigError, match="is there already"):
        storage.back_up(source, BASE_ID, tmp_path / "b")
    with stores(source), pytest.raises(ConfigError, match="in use"):
        storage.put_back(source, BASE_ID, tmp_path / "b", replace=True)
    assert everything(source) == before


@pytest.mark.parametrize(
    "part", ["registry.json", "tenants.json", "usage.json", "drift.json", "weights", "log"]
)
def test_a_damaged_backup_is_refused(settings_in, tmp_path, part):
    source, other = settings_in("one", shared=False), settings_in("two", shared=False)
    fill(source, tmp_path)
    storage.back_up(source, BASE_ID, backup := tmp_path / "b")
    if part == "weights":
        path = sorted(backup.glob("adapters/*/*/adapter_model.safetensors"))[0]
    else:
        path = backup / ("registry.json" if part == "log" else part)
    content = path.read_bytes()
    if part == "log":
        registry = json.loads(content)
        registry["entries"][1]["reason"] = "another"
        content = json.dumps(registry).encode()
        manifest = json.loads((backup / "manifest.json").read_bytes())
        manifest["sha256"]["registry.json"] = hashlib.sha256(content).hexdigest()
        (backup / "manifest.json").write_text(json.dumps(manifest))
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-9] + b"x" * 9)
    with pytest.raises((ConfigError, AdapterLoadError, ServiceError)):
        storage.put_back(other, BASE_ID, backup, replace=False)
    with stores(other) as kept:
        assert kept.registry.read()[1] == {}
        assert kept.drift.read() == {}


def test_a_backup_reads_beside_the_server_and_changes_nothing(settings_in, tmp_path):
    source = settings_in("one", shared=False)
    fill(source, tmp_path)
    with stores(source):
        storage.back_up(source, None, tmp_path / "b")
    none = settings_in("none", shared=False)
    with pytest.raises(ConfigError, match="there is no registry"):
        storage.back_up(none, BASE_ID, tmp_path / "c")
    with pytest.raises(ConfigError, match="which one"):
        storage.back_up(settings_in("empty", shared=False), None, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_commands(settings_in, tmp_path):
    source = settings_in("one", shared=False)
    fill(source, tmp_path)

    def run(*words: str):
        return CliRunner().invoke(app, [*map(str, words)])

    done = run("backup", tmp_path / "b.tar", "--home", source.home)
    assert (done.exit_code, "4 adapters" in done.stdout) == (0, True), done.output
    done = run("restore", tmp_path / "b.tar", "--home", tmp_path / "two")
    assert (done.exit_code, "4 adapters" in done.stdout) == (0, True), done.output
    done = run("restore", tmp_path / "b.tar", "--home", tmp_path / "two")
    assert done.exit_code == 2
    assert "--replace" in done.output
    for words in (("restore", tmp_path / "made"), ("backup", tmp_path / "x", "--home", tmp_path)):
        assert run(*words, *(() if "--home" in words else ("--home", tmp_path))).exit_code == 2
