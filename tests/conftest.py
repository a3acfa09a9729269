"""What the whole suite shares: the environment, the default model and a real Redis."""

import os
import sys
from collections.abc import Iterator
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
from support.redis_server import RedisServer

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then, which must be asked for before triton is
    # imported by anybody; importing torch does not. With a GPU they are compiled and run there.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


LONG = ("tests/e2e/", "tests/ops/test_triton_compile.py", "tests/deploy/", "tests/engine/")
"""Where files take tens of seconds each. Workers take files in this order (`make test`), so that at
the end there are only short ones and no worker waits for another.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first. Tests marked `gpu` are skipped, with the reason, where there is no CUDA
    device.
    """
    items.sort(key=lambda item: next((n for n, at in enumerate(LONG) if at in item.nodeid), 99))
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


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Redis of our own, on a free loopback port, without persistence."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The folder of the environment's commands (`manyhats`, `lint-imports`)."""
    return Path(sys.executable).parent
