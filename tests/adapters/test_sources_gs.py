"""Adapters out of a real Google Cloud Storage server (an emulator, on loopback), through gcsfs."""

from __future__ import annotations

import pytest

from manyhats.adapters.sources.address import AllowList, UrlSource
from manyhats.adapters.sources.fetch import Fetcher
from manyhats.adapters.sources.progress import Progress
from manyhats.errors import AdapterRejectedError

emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed"
)

CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * (3 << 10)  # 768 KiB
BOUND = 1 << 20
PREFIX = "gs://models/adapters/"


@pytest.fixture
def server(monkeypatch):
    """A running server whose bucket ``models`` holds an adapter."""
    # Read when gcsfs is imported: it would ask over gRPC, which no emulator speaks, what the
    # bucket can do.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="manyhats[gcs] is not installed")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="models")
    server.start()
    port = server._api._httpd.server_address[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    store = gcsfs.GCSFileSystem(token="anon", project="test", skip_instance_cache=True)
    store.pipe_file("models/adapters/a/adapter_config.json", CONFIG)
    store.pipe_file("models/adapters/a/adapter_model.safetensors", WEIGHTS)
    yield server
    server.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


def fetch(folder, url=PREFIX + "a", progress=None, bound=BOUND):
    fetcher = Fetcher(AllowList([PREFIX]), bound)
    paths = fetcher.fetch(UrlSource(url), folder, progress or Progress())
    return tuple(path.read_bytes() for path in paths)


def test_an_adapter_comes_whole_and_its_progress_is_told(server, tmp_path):
    progress = Progress()
    assert fetch(tmp_path, progress=progress) == (CONFIG, WEIGHTS)
    assert progress.done == progress.total == len(CONFIG) + len(WEIGHTS)


def test_what_is_not_to_be_had_is_refused_by_name(server, tmp_path):
    for url, bound, reason in (
        (PREFIX + "none", BOUND, "missing_file"),
        ("gs://other/adapters/a", BOUND, "source_not_allowed"),
        (PREFIX + "a", 1 << 19, "too_large"),
    ):
        with pytest.raises(AdapterRejectedError) as refusal:
            fetch(tmp_path, url, bound=bound)
        assert refusal.value.reason == reason, refusal.value.message
