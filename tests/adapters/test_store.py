"""The store: what is committed is whole, what is not committed is gone."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.staging import MAX_CONFIG_BYTES, manifest_bytes
from manyhats.adapters.store import AdapterStore
from manyhats.errors import AdapterLoadError, AdapterRejectedError, ConfigError, ServiceError
from manyhats.types import Digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOUND = 1000


@pytest.fixture
def store(tmp_path):
    store = AdapterStore(tmp_path / "store")
    yield store
    store.close()


def commit(store: AdapterStore, config: bytes = b"{}", weights: bytes = b"w") -> Digest:
    with store.stage(BOUND) as staging:
        staging.write(CONFIG, config)
        staging.write(WEIGHTS, weights)
        return store.commit(staging)


def left_over(tmp_path: Path) -> list[str]:
    """What lies in the processes' temporary folders beside their locks."""
    found = (tmp_path / "store" / "tmp").glob("*/*")
    return sorted(path.name for path in found if path.name != "lock")


def nothing_left(store: AdapterStore, tmp_path: Path) -> bool:
    return store.list() == [] and left_over(tmp_path) == []


def test_the_digest_is_the_sha256_of_the_canonical_description(store, tmp_path):
    digest = commit(store, b"{}", b"abc")
    expected = hashlib.sha256(
        b'{"files":[["adapter_config.json",2,"%s"],["adapter_model.safetensors",3,"%s"]],"format":1}'
        % (hashlib.sha256(b"{}").hexdigest().encode(), hashlib.sha256(b"abc").hexdigest().encode())
    ).hexdigest()
    assert digest == expected
    folder = store.path(digest)
    assert folder == tmp_path / "store" / digest[:2] / digest
    assert (folder / CONFIG).read_bytes() == b"{}"
    assert (folder / WEIGHTS).read_bytes() == b"abc"
    store.verified(digest)


def test_where_the_files_are_cut_changes_the_digest(store):
    assert commit(store, b"ab", b"c") != commit(store, b"a", b"bc")


def test_the_same_content_again_is_the_same_version(store, tmp_path):
    first = commit(store)
    inode = store.path(first).stat().st_ino
    assert commit(store) == first
    assert store.path(first).stat().st_ino == inode
    assert store.list() == [first]
    assert left_over(tmp_path) == []


def test_a_damaged_version_is_replaced_by_a_new_commit(store):
    digest = commit(store, b"{}", b"good")
    (store.path(digest) / WEIGHTS).write_bytes(b"evil")
    with pytest.raises(AdapterLoadError, match=r"adapter_model\.safetensors .* is damaged"):
        store.verified(digest)
    assert commit(store, b"{}", b"good") == digest
    store.verified(digest)
    assert (store.path(digest) / WEIGHTS).read_bytes() == b"good"


def test_uncommitted_staging_is_gone_even_after_an_exception(store, tmp_path):
    with pytest.raises(ZeroDivisionError), store.stage(BOUND) as staging:
        staging.write(WEIGHTS, b"x")
        assert (staging.path / WEIGHTS).read_bytes() == b"x", "readable before the commit"
        raise ZeroDivisionError
    assert nothing_left(store, tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_version_needs_both_files(store, tmp_path, name):
    refused = pytest.raises(AdapterRejectedError, match="missing_file")
    with refused as caught, store.stage(BOUND) as staging:
        staging.write(name, b"x")
        store.commit(staging)
    assert caught.value.param == (WEIGHTS if name == CONFIG else CONFIG)
    assert nothing_left(store, tmp_path)


@pytest.mark.parametrize(("name", "bound"), [(CONFIG, MAX_CONFIG_BYTES), (WEIGHTS, BOUND)])
def test_the_bound_holds_while_writing(store, tmp_path, name, bound):
    with store.stage(BOUND) as staging:
        staging.write(name, b"x" * bound)
        with pytest.raises(AdapterRejectedError, match=f"too_large: {name} .* {bound} bytes"):
            staging.write(name, b"x")
        assert (staging.path / name).stat().st_size == bound
    assert nothing_left(store, tmp_path)


def test_the_bound_holds_for_a_file_that_grows_while_it_is_copied(store, tmp_path, monkeypatch):
    """The source says one byte when it is looked at and has no end when it is read."""
    config, weights = tmp_path / "c", tmp_path / "w"
    config.write_bytes(b"{}")
    weights.write_bytes(b"x")
    with store.stage(BOUND) as staging:
        write = staging.write

        def growing(name, chunk):
            if name == WEIGHTS:
                with weights.open("ab") as file:
                    file.write(b"y" * 300)
            write(name, chunk)

        monkeypatch.setattr(staging, "write", growing)
        with pytest.raises(AdapterRejectedError, match="too_large"):
            staging.copy(config, weights)
        assert (staging.path / WEIGHTS).stat().st_size <= BOUND


def test_copying_follows_no_link_and_opens_no_pipe(store, tmp_path):
    secret, config = tmp_path / "secret", tmp_path / "c"
    secret.write_bytes(b"secret")
    config.write_bytes(b"{}")
    (tmp_path / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in [
        ("link", "path_not_allowed"),
        ("pipe", "path_not_allowed"),
        ("absent", "missing_file"),
        (".", "path_not_allowed"),
    ]:
        with pytest.raises(AdapterRejectedError) as caught, store.stage(BOUND) as staging:
            staging.copy(config, tmp_path / name)
        assert caught.value.reason == reason, name
    assert nothing_left(store, tmp_path)


def test_a_restart_removes_what_a_killed_process_left(tmp_path):
    root = tmp_path / "store"
    (root / "tmp" / "half").mkdir(parents=True)
    (root / "tmp" / "half" / WEIGHTS).write_bytes(b"half")
    store = AdapterStore(root)
    assert nothing_left(store, tmp_path)
    digest = commit(store)
    store.close()
    again = AdapterStore(root)
    assert again.list() == [digest]
    again.verified(digest)
    again.close()


def test_processes_share_the_folder_and_leave_what_another_writes(store, tmp_path):
    with store.stage(BOUND) as staging:
        staging.write(CONFIG, b"{}")
        other = AdapterStore(tmp_path / "store")
        staging.write(WEIGHTS, b"w")
        assert commit(other) == store.commit(staging), "the slower one finds it done"
    assert other.list() == store.list()
    other.close()
    assert len(list((tmp_path / "store" / "tmp").iterdir())) == 1, "the other's own is gone"


def test_removing_waits_for_those_who_add(store, tmp_path):
    """Two adders at once; the remover comes in when both have gone."""
    other, inside, order = AdapterStore(tmp_path / "store"), threading.Event(), []

    def remove():
        inside.set()
        with other.removing():
            order.append("removing")

    with store.adding(), other.adding():
        thread = threading.Thread(target=remove)
        thread.start()
        assert inside.wait(30)
        order.append("added")
    thread.join()
    assert order == ["added", "removing"]
    other.close()


def test_a_folder_belongs_to_one_registry(store):
    store.claim("one")
    store.claim("one")
    with pytest.raises(ConfigError, match="of another registry"):
        store.claim("two")


def test_lengths_are_checked_when_a_version_is_asked_for(store):
    digest = commit(store, b"{}", b"weights")
    (store.path(digest) / WEIGHTS).write_bytes(b"weig")
    with pytest.raises(AdapterLoadError, match="has 4 bytes on the disk, not 7"):
        store.path(digest)


def test_a_forged_manifest_is_noticed(store):
    digest = commit(store, b"{}", b"weights")
    folder = store.path(digest)
    forged = manifest_bytes({CONFIG: (2, "0" * 64), WEIGHTS: (7, "0" * 64)})
    (folder / "manifest.json").write_bytes(forged)
    with pytest.raises(AdapterLoadError, match=r"manifest\.json .* is damaged"):
        store.path(digest)


def test_delete_removes_and_says_whether_it_did(store, tmp_path):
    digest, other = commit(store, weights=b"1"), commit(store, weights=b"2")
    with (store.path(digest) / WEIGHTS).open("rb") as file:
        assert store.delete(digest)
        assert file.read() == b"1", "a reader keeps what it has open"
    assert store.list() == [other]
    assert not store.delete(digest)
    with pytest.raises(AdapterLoadError, match="not in the store"):
        store.path(digest)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("digest", ["", "..", "../" * 20, "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_a_digest_names_a_folder(store, digest):
    for call in (store.path, store.delete, store.verified):
        with pytest.raises(ValueError, match="not a digest"):
            call(Digest(digest))


def test_a_full_disk_is_the_servers_error_and_leaves_nothing(store, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ServiceError, match="No space left on device"):
        commit(store)
    assert nothing_left(store, tmp_path)


def test_threads_that_commit_the_same_content_agree(store, tmp_path):
    barrier, digests = threading.Barrier(8), []

    def run():
        with store.stage(BOUND) as staging:
            staging.write(CONFIG, b"{}")
            staging.write(WEIGHTS, b"same")
            barrier.wait()
            digests.append(store.commit(staging))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 8
    assert store.list() == sorted(set(digests))
    assert len(set(digests)) == 1
    store.verified(digests[0])
    assert left_over(tmp_path) == []


@settings(max_examples=25)
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6),
    config=st.binary(min_size=1, max_size=30),
)
def test_how_the_bytes_come_changes_nothing(tmp_path_factory, chunks, config):
    store = AdapterStore(tmp_path_factory.mktemp("s"))
    with store.stage(BOUND) as staging:
        for chunk in chunks:
            staging.write(WEIGHTS, chunk)
        staging.write(CONFIG, config)
        in_parts = store.commit(staging)
    assert commit(store, config, b"".join(chunks)) == in_parts
    assert json.loads((store.path(in_parts) / "manifest.json").read_bytes())["format"] == 1
    store.close()
