"""What the engine's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.server import share_caches


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for engines that keep nothing but the compiled kernels in it."""
    folder = tmp_path_factory.getbasetemp() / "home"
    share_caches(folder)
    return folder
