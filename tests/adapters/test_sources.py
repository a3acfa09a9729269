"""Fetching adapters from elsewhere: what is allowed, bounds, broken connections, over real sockets;
an object store in memory; a hub on loopback.
"""

from __future__ import annotations

import hashlib
import json
import socket

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.web import web_server

from manyhats.adapters.sources import address
from manyhats.adapters.sources.address import AllowList, HubSource, UrlSource
from manyhats.adapters.sources.fetch import Fetcher
from manyhats.adapters.sources.partial import PartialFile
from manyhats.adapters.sources.progress import CancelledFetchError, Progress
from manyhats.adapters.sources.stores import StoreFetcher
from manyhats.adapters.sources.web import WebFetcher
from manyhats.errors import AdapterRejectedError, ConfigError, ServiceError

WEIGHTS = bytes(range(256)) * 400
CONFIG = b'{"peft_type": "LORA"}'
BOUND = 128 << 10


@pytest.fixture
def web():
    with web_server() as web:
        web.files = {
            "/pub/a/adapter_config.json": CONFIG,
            "/pub/a/adapter_model.safetensors": WEIGHTS,
            "/private/adapter_config.json": CONFIG,
        }
        yield web


def fetched(web, folder, *, allow=None, progress=None, **source):
    """(configuration, weights) of ``/pub/a`` on the web server, through ``Fetcher``."""
    source = UrlSource(source.pop("url", f"{web.url}/pub/a"), **source)
    fetcher = Fetcher(AllowList(allow or [f"{web.url}/pub/"]), BOUND)
    folder.mkdir(exist_ok=True)
    paths = fetcher.fetch(source, folder, progress or Progress())
    return tuple(path.read_bytes() for path in paths)


def refused(reason, call):
    with pytest.raises(AdapterRejectedError) as caught:
        call()
    assert caught.value.reason == reason, caught.value.message
    return caught.value.message


def test_both_files_come_whole_and_the_progress_is_told(web, tmp_path):
    progress = Progress()
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    assert fetched(web, tmp_path, progress=progress, sha256=sha) == (CONFIG, WEIGHTS)
    assert progress.done == progress.total == len(CONFIG) + len(WEIGHTS)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    refused("digest_mismatch", lambda: fetched(web, tmp_path, sha256="0" * 64))


def test_adapterhubs_weights_are_found_under_their_name(web, tmp_path):
    web.files["/pub/a/adapter.safetensors"] = web.files.pop("/pub/a/adapter_model.safetensors")
    assert fetched(web, tmp_path) == (CONFIG, WEIGHTS)


def test_a_broken_connection_is_taken_up_where_it_broke(web, tmp_path):
    path = "/pub/a/adapter_model.safetensors"
    web.cut[path] = [1000, 70_000]
    progress = Progress()
    assert fetched(web, tmp_path, progress=progress) == (CONFIG, WEIGHTS)
    asked = [wanted for at, wanted in web.asked if at == path]
    assert asked == [None, "bytes=1000-", "bytes=71000-"]
    assert progress.done == progress.total


@pytest.mark.parametrize("ranges", [True, False])
def test_what_has_changed_meanwhile_is_fetched_anew(web, tmp_path, ranges):
    path = "/pub/a/adapter_model.safetensors"
    web.cut[path] = [5000]
    web.ranges = ranges
    with pytest.raises(CancelledFetchError):
        fetched(web, tmp_path, progress=_CancelsAt(5000))
    changed = WEIGHTS[::-1]
    web.files[path] = changed
    assert fetched(web, tmp_path) == (CONFIG, changed)


class _CancelsAt(Progress):
    """Cancelled once so many bytes are there."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def add(self, size: int) -> None:
        if self.done + size >= self._size:
            self.cancel()
        super().add(size)


def test_a_cancelled_fetch_goes_on_later(web, tmp_path):
    with pytest.raises(CancelledFetchError):
        fetched(web, tmp_path, progress=_CancelsAt(len(CONFIG) + 1))
    kept = (tmp_path / "adapter_model.safetensors.part").stat().st_size
    assert 0 < kept <= len(WEIGHTS)
    progress = Progress()
    assert fetched(web, tmp_path, progress=progress) == (CONFIG, WEIGHTS)
    assert web.asked[-1][1] == (f"bytes={kept}-" if kept < len(WEIGHTS) else web.asked[-1][1])
    assert progress.done == progress.total


@pytest.mark.parametrize("lengths", [True, False])
def test_what_is_too_large_is_refused_and_never_written(web, tmp_path, lengths):
    web.lengths = lengths
    web.files["/pub/a/adapter_model.safetensors"] = WEIGHTS * 2
    assert "max_adapter_mb" in refused("too_large", lambda: fetched(web, tmp_path))
    assert max(p.stat().st_size for p in tmp_path.iterdir()) <= BOUND


def test_a_server_that_only_breaks_off_is_given_up(web, tmp_path):
    path = "/pub/a/adapter_model.safetensors"
    web.cut[path] = [100, *[0] * 20]
    waits = []
    fetcher = WebFetcher(AllowList([f"{web.url}/pub/"]), wait=waits.append)
    with (
        PartialFile(tmp_path, "w", BOUND, Progress()) as file,
        pytest.raises(ServiceError, match="broke off at 100 bytes, 5 times"),
    ):
        fetcher.fetch(web.url + path, file)
    fetcher.close()
    assert waits == sorted(waits)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, AdapterRejectedError, "missing_file"),
        (403, AdapterRejectedError, "source_refused.*answers 403"),
        (503, ServiceError, "answers 503; try again"),
    ],
)
def test_what_the_other_side_refuses_is_told(web, tmp_path, status, error, message):
    web.statuses["/pub/a/adapter_config.json"] = status
    with pytest.raises(error, match=message):
        fetched(web, tmp_path)


def test_redirects_stay_on_the_list(web, tmp_path):
    config = web.files.pop("/pub/a/adapter_config.json")
    web.files["/pub/b/c.json"] = config
    web.redirects["/pub/a/adapter_config.json"] = "../b/c.json"
    assert fetched(web, tmp_path) == (CONFIG, WEIGHTS)
    for off in (f"{web.url}/private/adapter_config.json", "http://169.254.169.254/x", "file:///x"):
        web.redirects["/pub/a/adapter_config.json"] = off
        with pytest.raises(AdapterRejectedError, match=r"source_not_allowed|bad_source"):
            fetched(web, tmp_path)
    assert "/private/adapter_config.json" not in {path for path, _ in web.asked}
    web.redirects["/pub/a/adapter_config.json"] = f"{web.url}/pub/a/adapter_config.json"
    assert "redirects" in refused("source_refused", lambda: fetched(web, tmp_path))


def test_a_name_may_lead_to_the_networks_that_are_listed_only(web, tmp_path, monkeypatch):
    url = f"http://models.example:{web.port}/pub"
    real = socket.getaddrinfo

    def lead(host, *more, **options):
        return real("127.0.0.1" if host == "models.example" else host, *more, **options)

    monkeypatch.setattr(address.socket, "getaddrinfo", lead)
    there = {"url": f"{url}/a", "allow": [url]}
    message = refused("source_not_allowed", lambda: fetched(web, tmp_path, **there))
    assert "127.0.0.1, which is no public address" in message
    assert web.asked == []
    there["allow"] = [url, "127.0.0.0/8"]
    assert fetched(web, tmp_path, **there) == (CONFIG, WEIGHTS)


@pytest.mark.parametrize(
    "url",
    [
        "https://a.example/pubs/x",
        "https://a.example/pu",
        "https://a.example.evil.example/pub/x",
        "https://a.example:444/pub/x",
        "http://a.example/pub/x",
        "s3://other/x",
        "s3://bucket2/x",
    ],
)
def test_what_is_not_on_the_list_is_refused_with_the_settings_name(url):
    allow = AllowList(["https://a.example/pub", "s3://bucket/"])
    for ok in ("https://A.example/pub/x", "https://a.example:443/pub", "s3://bucket/x/y"):
        allow.check(UrlSource(ok))
    assert "--source-allow" in refused("source_not_allowed", lambda: allow.check(UrlSource(url)))
    assert "--source-allow" in refused(
        "source_not_allowed", lambda: AllowList([]).check(UrlSource(url))
    )


@given(
    st.sampled_from(["..", ".", "%2e%2e", "x?y", "x#y", "a b", "\\", "\n", "x%00"]), st.booleans()
)
def test_a_path_that_could_mean_another_is_refused(part, last):
    url = f"https://a.example/pub/{part}" + ("" if last else "/x")
    refused("bad_source", lambda: AllowList(["https://a.example/pub/"]).check(UrlSource(url)))


@pytest.mark.parametrize(
    "url", ["https://u:p@a.example/pub/", "ftp://a.example/", "file:///x", "x"]
)
def test_an_address_that_is_none_is_refused(url):
    refused("bad_source", lambda: AllowList(["https://a.example/"]).check(UrlSource(url)))


@pytest.mark.parametrize("entry", ["a.example", "ftp://x/", "10.0.0.1/8", "https://x/..", ""])
def test_a_bad_entry_of_the_list_is_told_at_start(entry):
    with pytest.raises(ConfigError, match="source_allow"):
        AllowList([entry])


def test_an_object_store_is_read_and_gone_on_with(tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/w", WEIGHTS)
    fetcher = StoreFetcher()
    with (
        PartialFile(tmp_path, "w", BOUND, _CancelsAt(1)) as file,
        pytest.raises(CancelledFetchError),
    ):
        fetcher.fetch("memory://bucket/w", file)
    part = tmp_path / "w.part"
    part.write_bytes(b"x" * 1000)  # of the same version: what is there is not read again
    with PartialFile(tmp_path, "w", BOUND, Progress()) as file:
        assert fetcher.fetch("memory://bucket/w", file)
        file.finish()
    assert (tmp_path / "w").read_bytes() == b"x" * 1000 + WEIGHTS[1000:]
    with PartialFile(tmp_path, "v", 1000, Progress()) as file:
        refused("too_large", lambda: fetcher.fetch("memory://bucket/w", file))
        assert not fetcher.fetch("memory://bucket/none", file)
        refused("source_unavailable", lambda: fetcher.fetch("dbx-none://bucket/none", file))


REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub(web, weights=WEIGHTS):
    """What the hub's client asks of a repository ``org/a``."""
    files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": weights, "x.bin": b"x"}
    tree = [
        {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
        for n, b in files.items()
    ]
    info = {"id": "org/a", "modelId": "org/a", "sha": REVISION, "siblings": [], "private": False}
    web.files = {
        f"/api/models/org/a/revision/{REVISION}": json.dumps(info).encode(),
        f"/api/models/org/a/tree/{REVISION}": json.dumps(tree).encode(),
        **{f"/org/a/resolve/{REVISION}/{name}": data for name, data in files.items()},
    }
    web.commit = REVISION


def test_a_repository_of_the_hub_at_a_commit(web, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub(web)
    progress = Progress()
    fetcher = Fetcher(AllowList(["hf://org/"]), BOUND, web.url)
    config, weights = fetcher.fetch(HubSource("org/a", REVISION), tmp_path, progress)
    assert (config.read_bytes(), weights.read_bytes()) == (CONFIG, WEIGHTS)
    assert progress.done == progress.total == len(CONFIG) + len(WEIGHTS)
    assert not any("x.bin" in path for path, _ in web.asked)
    hub(web, WEIGHTS * 2)
    web.asked.clear()
    other = tmp_path / "other"
    other.mkdir()
    refused("too_large", lambda: fetcher.fetch(HubSource("org/a", REVISION), other, Progress()))
    assert not any("resolve" in path and "safetensors" in path for path, _ in web.asked if _)


def test_the_hub_is_asked_only_for_what_is_listed_and_pinned():
    allow = AllowList(["hf://org/", "hf://other/one"])
    allow.check(HubSource("org/a", REVISION))
    allow.check(HubSource("other/one", REVISION))
    AllowList(["hf://"]).check(HubSource("any/one", REVISION))
    for repo in ("other/two", "orgs/a"):
        refused("source_not_allowed", lambda repo=repo: allow.check(HubSource(repo, REVISION)))
    for repo, revision in (("org/a", "main"), ("org", REVISION), ("../a", REVISION)):
        source = HubSource(repo, revision)
        refused("bad_source", lambda source=source: allow.check(source))
