"""Adapters out of a real Google Cloud Storage server (an emulator, on loopback), through gcsfs."""

from __future__ import annotations

import pytest
from support.object_stores import Bucket

emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed"
)

BUCKET = Bucket("gs", bytes(range(256)) * (3 << 10))  # 768 KiB


@pytest.fixture
def server(monkeypatch):
    """A running server that has the bucket."""
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
    BUCKET.fill(store.pipe_file)
    yield server
    server.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_an_adapter_comes_whole_and_its_progress_is_told(server, tmp_path):
    BUCKET.comes_whole(tmp_path)


def test_what_is_not_to_be_had_is_refused_by_name(server, tmp_path):
    BUCKET.refuses_by_name(tmp_path)
