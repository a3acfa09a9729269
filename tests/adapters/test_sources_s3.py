"""Adapters out of a real S3 server (moto's, on loopback), through the store's own library."""

from __future__ import annotations

import pytest
from support.object_stores import WEIGHTS_PATH, Bucket

from manyhats.adapters.sources.progress import CancelledFetchError, Progress
from manyhats.errors import ServiceError

s3fs = pytest.importorskip("s3fs", reason="manyhats[s3] is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto is not installed")

BUCKET = Bucket("s3", bytes(range(256)) * (20 << 10))  # 5 MiB: several reads


@pytest.fixture
def server(monkeypatch):
    """A running server that has the bucket; ``put`` replaces a file."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.makedirs("models", exist_ok=True)  # the servers of one process share their state
    BUCKET.fill(store.pipe_file)
    server.put = store.pipe_file
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


class Breaking(Progress):
    """Ends the fetch once so much of it has come."""

    def check(self):
        if self.done > 2 << 20:
            self.cancel()
        super().check()


def test_an_adapter_comes_whole_and_its_progress_is_told(server, tmp_path):
    BUCKET.comes_whole(tmp_path)


def test_a_fetch_goes_on_where_it_ended_unless_the_object_has_changed(server, tmp_path):
    for changed in (False, True):
        folder = tmp_path / str(changed)
        with pytest.raises(CancelledFetchError):
            BUCKET.fetch(folder, progress=Breaking())
        [part] = folder.glob("*model*.part")
        before = part.stat().st_size
        assert 0 < before < len(BUCKET.weights)
        if changed:
            server.put(WEIGHTS_PATH, BUCKET.weights[::-1])
        wanted = BUCKET.weights[::-1] if changed else BUCKET.weights
        assert BUCKET.fetch(folder)[1] == wanted


def test_what_is_not_to_be_had_is_refused_by_name(server, tmp_path):
    BUCKET.refuses_by_name(tmp_path)


def test_a_store_that_is_away_may_be_asked_again(server, tmp_path):
    server.stop()
    with pytest.raises(ServiceError, match="s3://models/adapters/a"):
        BUCKET.fetch(tmp_path)
