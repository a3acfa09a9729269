"""Registration as one act: it is there whole, or nothing of it is."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support import adapter_service
from support.adapter_service import (
    BASE_ID,
    MAX_BYTES,
    SITE,
    compile_folder,
    config_bytes,
    open_adapters,
    weights_bytes,
    write_adapter,
)

from manyhats.adapters.folder import AdapterFolder
from manyhats.adapters.host import HostCache
from manyhats.errors import (
    AdapterLoadError,
    AdapterRejectedError,
    ConflictError,
    ModelNotFoundError,
    RequestError,
    ServiceError,
)
from manyhats.lifecycle.loading import load_adapter
from manyhats.lifecycle.records import Registration
from manyhats.types import DEFAULT_TENANT, Digest, TenantId

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapters(tmp_path):
    with open_adapters(tmp_path / "home") as adapters:
        yield adapters


def register(adapters, name, seed=0):
    folder = write_adapter(adapters.root / f"{name}-{seed}", seed)
    return adapters.service.register_folder(name, str(folder), tenant=DEFAULT_TENANT)


def test_what_a_conversion_came_to_is_kept_with_the_version(tmp_path, monkeypatch):
    found = {"conversion_error": "8.00e-04", "converted_sites": "2", "rank": "7"}
    monkeypatch.setattr(
        adapter_service,
        "compile_folder",
        lambda folder: replace(compile_folder(folder), metadata=found),
    )
    with open_adapters(tmp_path / "home") as adapters:
        folder = write_adapter(adapters.root / "oft", 1)
        adapters.service.register_folder(
            "oft",
            str(folder),
            tenant=DEFAULT_TENANT,
            registration=Registration(metadata={"data": "logs"}),
        )
        kept = adapters.service.entry("oft", DEFAULT_TENANT).get(1).metadata
    assert kept == {"data": "logs", "conversion_error": "8.00e-04", "converted_sites": "2"}


def assert_untouched(adapters):
    assert adapters.store.list() == []
    assert adapters.leftovers() == []
    assert adapters.service.list(DEFAULT_TENANT) == []


def test_a_registered_adapter_can_be_resolved_listed_and_loaded(adapters):
    card = register(adapters, "pirate", seed=1)
    assert (card.ref.name, card.ref.version, card.family, card.max_rank) == ("pirate", 1, "lora", 2)
    assert (card.nbytes, card.created) == ((2 * 8 + 12 * 2) * 4, 1234)
    service = adapters.service
    assert service.resolve("pirate", DEFAULT_TENANT) == card.ref
    assert service.resolve("pirate@1", DEFAULT_TENANT) == card.ref
    assert service.resolve(BASE_ID, DEFAULT_TENANT) is None
    assert service.list(DEFAULT_TENANT) == [card]
    assert adapters.store.list() == [card.ref.digest]
    assert adapters.leftovers() == []
    loaded = load_adapter(adapters.store, compile_folder, card.ref.digest)
    original = compile_folder(AdapterFolder(adapters.root / "pirate-1"))
    assert loaded.digest == card.ref.digest
    assert torch.equal(loaded.sites[SITE].low_rank.a, original.sites[SITE].low_rank.a)
    assert torch.equal(loaded.sites[SITE].low_rank.b, original.sites[SITE].low_rank.b)


def test_versions(adapters):
    first, second = register(adapters, "a", 1), register(adapters, "a", 2)
    assert register(adapters, "a", 2) == second, "the same content again"
    assert [str(c.ref) for c in adapters.service.list(DEFAULT_TENANT)] == ["a@1", "a@2"]
    assert adapters.service.resolve("a", DEFAULT_TENANT) == second.ref
    assert adapters.service.get("a@1", DEFAULT_TENANT) == first
    sources = [r.source for r in adapters.service.entry("a", DEFAULT_TENANT).versions]
    assert sources == [str(adapters.root / "a-1"), str(adapters.root / "a-2")]


def test_what_is_registered_no_longer_follows_its_folder(adapters):
    card = register(adapters, "a")
    folder = adapters.root / "a-0"
    (folder / WEIGHTS).write_bytes(b"changed")
    adapters.store.verified(card.ref.digest)
    shutil.rmtree(folder)
    assert load_adapter(adapters.store, compile_folder, card.ref.digest).max_rank == 2


BROKEN = {
    "truncated": lambda w: w[:-3],
    "garbage": lambda w: b"\xff" * len(w),
    "pickle": lambda w: b"\x80\x04\x95" + w,
    "not_finite": lambda w: weights_bytes(scale=float("inf")),
    "rank_too_large": lambda w: weights_bytes(rank=9),
    "too_large": lambda w: w + b"\0" * MAX_BYTES,
    "empty": lambda w: b"",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_bad_adapter_leaves_nothing_behind(adapters, how):
    folder = write_adapter(adapters.root / "bad")
    weights = folder / WEIGHTS
    weights.write_bytes(BROKEN[how](weights.read_bytes()))
    if how == "rank_too_large":
        (folder / "adapter_config.json").write_bytes(config_bytes(rank=9))
    with pytest.raises(AdapterRejectedError):
        adapters.service.register_folder("bad", str(folder), tenant=DEFAULT_TENANT)
    assert_untouched(adapters)
    assert register(adapters, "bad").ref.version == 1, "and the name is free"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda a: str(a.home / "elsewhere"), "path_not_allowed"),
        (lambda a: str(a.root / ".." / "elsewhere"), "path_not_allowed"),
        (lambda a: "../../../../etc", "path_not_allowed"),
        (lambda a: "/etc\x00", "path_not_allowed"),
        (lambda a: "x" * 5000, "path_not_allowed"),
        (lambda a: str(a.root / "link"), "path_not_allowed"),
        (lambda a: str(a.root / "linked-file"), "path_not_allowed"),
        (lambda a: str(a.root / "absent"), "missing_file"),
    ],
)
def test_paths_do_not_escape_the_roots(adapters, make, reason):
    elsewhere = write_adapter(adapters.home / "elsewhere")
    (adapters.root / "link").symlink_to(elsewhere)
    linked = write_adapter(adapters.root / "linked-file")
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(elsewhere / WEIGHTS)
    with pytest.raises(AdapterRejectedError) as caught:
        adapters.service.register_folder("a", make(adapters), tenant=DEFAULT_TENANT)
    assert caught.value.reason == reason
    assert_untouched(adapters)


def test_a_link_within_the_roots_is_followed(adapters):
    """The layout of hub caches: snapshots link to blobs beside them."""
    folder = write_adapter(adapters.root / "snapshot")
    (folder / WEIGHTS).rename(adapters.root / "blob")
    (folder / WEIGHTS).symlink_to("../blob")
    card = adapters.service.register_folder("a", str(folder), tenant=DEFAULT_TENANT)
    assert not (adapters.store.path(card.ref.digest) / WEIGHTS).is_symlink()


@pytest.mark.parametrize("name", ["a/b", "..", "a@1", "é", "x" * 200, ""])
def test_a_bad_name_is_refused_before_anything_is_read(adapters, name):
    with pytest.raises(RequestError) as caught:
        adapters.service.register_folder(name, "/nowhere", tenant=DEFAULT_TENANT)
    assert caught.value.param == "name"


def test_the_bases_name_is_taken(adapters):
    with pytest.raises(ConflictError, match="is the base model's id"):
        register(adapters, BASE_ID)
    assert_untouched(adapters)


def test_a_registry_that_cannot_be_written_leaves_no_bytes(adapters):
    kept = register(adapters, "kept", 1)
    adapters.registry.store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(ServiceError):
        register(adapters, "a", 2)
    with pytest.raises(ServiceError):
        register(adapters, "b", 1)
    assert adapters.store.list() == [kept.ref.digest], "the bytes that another name uses stay"
    assert adapters.leftovers() == []


def test_the_bound_of_versions_leaves_no_bytes(tmp_path):
    with open_adapters(tmp_path, max_versions=1) as adapters:
        card = register(adapters, "a", 1)
        with pytest.raises(ConflictError, match="max_adapters"):
            register(adapters, "a", 2)
        assert adapters.store.list() == [card.ref.digest]
        assert register(adapters, "a", 1) == card


def test_delete_drops_what_nobody_else_uses(adapters):
    shared = register(adapters, "a", 1)
    own = register(adapters, "a", 2)
    other = register(adapters, "b", 1)
    assert other.ref.digest == shared.ref.digest
    with pytest.raises(ConflictError, match="'a' with its 2 versions is not deleted without force"):
        adapters.service.delete("a", DEFAULT_TENANT)
    assert adapters.service.delete("a", DEFAULT_TENANT, force=True) == (shared.ref, own.ref)
    assert adapters.residency.dropped == [own.ref]
    assert adapters.store.list() == [shared.ref.digest]
    assert adapters.service.delete("b", DEFAULT_TENANT) == (other.ref,)
    assert adapters.residency.dropped == [own.ref, other.ref]
    assert_untouched(adapters)
    with pytest.raises(ModelNotFoundError):
        adapters.service.resolve("a", DEFAULT_TENANT)


def test_content_that_comes_back_after_its_deletion_is_told_to_the_device(adapters):
    """Running requests may hold the dropped copy; without word the name would stay refused."""
    register(adapters, "a", 1)
    assert adapters.residency.prefetched == [], "registering alone brings nothing to memory"
    adapters.service.delete("a", DEFAULT_TENANT)
    register(adapters, "other", 2)
    assert adapters.residency.prefetched == []
    back = register(adapters, "b", 1)
    assert adapters.residency.prefetched == [back.ref]
    register(adapters, "c", 1)
    assert adapters.residency.prefetched == [back.ref], "once"


def test_delete_takes_whole_names_of_ones_own(adapters):
    register(adapters, "a")
    with pytest.raises(ModelNotFoundError):
        adapters.service.delete("a@2", DEFAULT_TENANT)
    for name, tenant in (("b", DEFAULT_TENANT), ("a", TenantId("other")), ("../a", DEFAULT_TENANT)):
        with pytest.raises(ModelNotFoundError):
            adapters.service.delete(name, tenant)
    assert len(adapters.service.list(DEFAULT_TENANT)) == 1
    assert adapters.residency.dropped == []


def test_a_load_after_the_deletion_fails_and_one_before_stays(adapters):
    card = register(adapters, "a")
    cache = HostCache(1 << 20, lambda d: load_adapter(adapters.store, compile_folder, d))
    with cache.hold(card.ref.digest) as held:
        adapters.service.delete("a", DEFAULT_TENANT)
        cache.drop(card.ref.digest)
        assert held.max_rank == 2
    with pytest.raises(AdapterLoadError, match="not in the store"):
        cache.get(card.ref.digest)


def test_what_is_damaged_on_the_disk_fails_alone(adapters):
    good, bad = register(adapters, "good", 1), register(adapters, "bad", 2)
    path = adapters.store.path(bad.ref.digest) / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last weight, by its last bit: still a well-formed file
    path.write_bytes(content)
    compile_folder(AdapterFolder(path.parent))
    with pytest.raises(AdapterLoadError, match=f"{WEIGHTS} of adapter .* is damaged on the disk"):
        load_adapter(adapters.store, compile_folder, bad.ref.digest)
    assert load_adapter(adapters.store, compile_folder, good.ref.digest).max_rank == 2


def test_near_names_are_listed(adapters):
    for name in ("pirate", "private", "robot"):
        register(adapters, name)
    for model, near in [("pirat", "pirate"), ("robto", "robot"), ("tiny-bas", BASE_ID)]:
        with pytest.raises(ModelNotFoundError) as caught:
            adapters.service.resolve(model, DEFAULT_TENANT)
        assert near in caught.value.message.partition("near names: ")[2]
        assert caught.value.param == "model"
    with pytest.raises(ModelNotFoundError, match=r"the newest of it: pirate@1$"):
        adapters.service.resolve("pirate@7", DEFAULT_TENANT)
    with pytest.raises(ModelNotFoundError, match=f"the base is {BASE_ID}$"):
        adapters.service.resolve("qqqqqqqqq", DEFAULT_TENANT)
    adapters.service.delete("pirate", DEFAULT_TENANT)
    with pytest.raises(ModelNotFoundError) as caught:
        adapters.service.resolve("pirat", DEFAULT_TENANT)
    assert "pirate" not in caught.value.message


def test_another_tenant_learns_nothing_of_the_names(adapters):
    register(adapters, "pirate")
    for model in ("pirat", "pirate", "pirate@1", "pirate@2"):
        with pytest.raises(ModelNotFoundError) as caught:
            adapters.service.resolve(model, TenantId("other"))
        assert "pirate@1" not in caught.value.message.replace(repr(model), "")
        assert "near names" not in caught.value.message
    assert adapters.service.list(TenantId("other")) == []


def test_a_long_unknown_name_is_cut_in_the_message(adapters):
    with pytest.raises(ModelNotFoundError) as caught:
        adapters.service.resolve("x" * 100_000 + "@1", DEFAULT_TENANT)
    assert len(caught.value.message) < 300


def test_a_restart_finds_everything_and_removes_bytes_without_a_name(tmp_path):
    with open_adapters(tmp_path) as adapters:
        card = register(adapters, "a")
        with adapters.service.stage() as staging:
            staging.write("adapter_config.json", b"{}")
            staging.write(WEIGHTS, b"orphan")
            adapters.store.commit(staging)
        assert len(adapters.store.list()) == 2
    with open_adapters(tmp_path) as again:
        assert again.store.list() == [card.ref.digest]
        assert again.service.list(DEFAULT_TENANT) == [card]


def test_a_version_whose_bytes_are_missing_is_told_and_fails_alone(tmp_path, caplog):
    with open_adapters(tmp_path) as adapters:
        card = register(adapters, "a")
        adapters.store.delete(card.ref.digest)
    with open_adapters(tmp_path) as again:
        assert f"{card.ref.digest} is registered, its bytes are missing" in caplog.text
        assert again.service.resolve("a", DEFAULT_TENANT) == card.ref
        with pytest.raises(AdapterLoadError):
            load_adapter(again.store, compile_folder, card.ref.digest)
        assert register(again, "a") == card, "registering the same content again heals it"
        assert load_adapter(again.store, compile_folder, card.ref.digest).digest == Digest(
            card.ref.digest
        )


def test_no_folder_at_all_may_be_registered_from_without_a_root(adapters, monkeypatch):
    monkeypatch.setattr(adapters.service, "_roots", ())
    with pytest.raises(AdapterRejectedError, match="--adapter-root"):
        register(adapters, "a")


def test_many_at_once(adapters):
    """Names and contents shared between threads: no version is lost, no bytes are left over."""
    folders = [str(write_adapter(adapters.root / str(seed), seed)) for seed in range(3)]
    start = threading.Barrier(6)

    def work(worker):
        start.wait(20)
        for i in range(6):
            name = f"n{(worker + i) % 3}"
            if (worker + i) % 4 == 3:
                try:
                    adapters.service.delete(name, DEFAULT_TENANT, force=True)
                except ModelNotFoundError:
                    continue
            else:
                folder = folders[(worker * i) % 3]
                adapters.service.register_folder(name, folder, tenant=DEFAULT_TENANT)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, worker) for worker in range(6)]:
            done.result(60)
    cards = adapters.service.list(DEFAULT_TENANT)
    assert adapters.store.list() == sorted({c.ref.digest for c in cards})
    assert adapters.leftovers() == []
    for card in cards:
        adapters.store.verified(card.ref.digest)
    for name in {c.ref.name for c in cards}:
        adapters.service.delete(name, DEFAULT_TENANT, force=True)
    assert_untouched(adapters)
