"""The composition root, over a tiny model: what is said of kernels that had to be passed over."""

from __future__ import annotations

import asyncio
import logging
import os

import httpx
import pytest
import torch
from support.base import tiny_settings, write_base
from support.scripts import FAILING_CC, script

from manyhats.app import build
from manyhats.errors import ConfigError


@pytest.fixture
def threads():
    """A built application leaves this thread one of torch's; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path):
    return tiny_settings(tmp_path / "home", write_base(tmp_path / "base"), kernels="auto")


def answers(api, *paths: str) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(run())


def test_a_root_that_is_not_there_is_told_before_the_base_is_loaded(tmp_path):
    gone = tmp_path / "gone"
    settings = tiny_settings(tmp_path, tmp_path / "none", adapter_root=(gone,), register_roots=True)
    with pytest.raises(ConfigError, match=f"--adapter-root {gone}: no such folder"):
        build(settings)


@pytest.mark.usefixtures("threads")
def test_native_code_that_cannot_be_built_is_a_warning_and_shows(
    settings, tmp_path, monkeypatch, caplog
):
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "cc", FAILING_CC)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with caplog.at_level(logging.INFO, "manyhats.app"):
        application = build(settings)
    try:
        ready, metrics = answers(application.api, "/readyz", "/metrics")
    finally:
        for close in application.closing:
            close()
    (told,) = [r for r in caplog.records if r.getMessage().startswith("kernels: ")]
    assert told.levelno == logging.WARNING
    kernels = ready.json()["kernels"]
    assert told.getMessage() == f"kernels: torch ({kernels['reason']})"
    assert kernels["backend"] == "torch"
    assert kernels["reason"].startswith("plain PyTorch, slower: ")
    assert "cannot make vectors" in kernels["reason"]
    assert 'manyhats_kernels_info{backend="torch"} 1.0' in metrics.text.splitlines()
