"""A backup holds all of a base, in whatever store it is, and is put back whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from support.adapter_service import BASE_ID, compile_folder, open_adapters, write_adapter
from typer.testing import CliRunner

from manyhats.cli import app
from manyhats.commands import storage
from manyhats.config import Settings
from manyhats.errors import AdapterLoadError, ConfigError, ServiceError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.backup import Kept
from manyhats.lifecycle.compositions import NamedComposition
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


def fill(settings: Settings, tmp_path) -> None:
    """Versions, one retired, a canary, a composition, a deleted name, tenants, a key, usage."""
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
        return kept.registry.dump(), kept.adapters.list(), tenants, kept.usage.read(0)


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


@pytest.mark.parametrize("part", ["registry.json", "tenants.json", "usage.json", "weights", "log"])
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
