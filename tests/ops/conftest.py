"""The backends that this machine has, each built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from manyhats.config import Settings
from manyhats_kernels import Backend, resolve

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def native_cache() -> Path:
    """Where `make test` has compiled the kernels."""
    return Settings().home / "kernels"


@pytest.fixture(scope="session", params=["reference", "torch", "native"])
def backend(request: pytest.FixtureRequest, native_cache: Path) -> Backend:
    """Every backend in turn; a C compiler is a requirement of the test suite."""
    if request.param == "native":
        assert shutil.which("cc"), "the suite needs a C compiler"
    return resolve(request.param, device=torch.device("cpu"), cache_dir=native_cache).backend


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty is NaN, so that scratch memory which nobody wrote shows."""
    empty = torch.empty

    def poisoned(*arguments: object, **options: object) -> torch.Tensor:
        made = empty(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
