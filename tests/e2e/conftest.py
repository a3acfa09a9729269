"""One real server for all of these tests: fp32, no quantization, the demo adapters registered."""

from __future__ import annotations

import pytest
from support.server import demo_flags, running_server


@pytest.fixture(scope="session")
def server(smollm2_path, repository, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with running_server(
        home,
        "--model",
        str(smollm2_path),
        "--quantization",
        "none",
        "--dtype",
        "fp32",
        "--kv-cache-mb",
        "1024",
        "--max-queue",
        "64",
        *demo_flags(repository),
    ) as running:
        yield running
