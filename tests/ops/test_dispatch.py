"""Backends by name, and what is said of one that cannot work here."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.scripts import FAILING_CC, script

from manyhats_kernels import Backend, BackendUnavailableError, dispatch, resolve
from manyhats_kernels import triton as triton_package
from manyhats_kernels.native import build as native_build

CPU = torch.device("cpu")


def test_every_backend_keeps_the_protocol(backend):
    assert isinstance(backend, Backend)
    assert backend.kv_cache_shape(5, 16, 3, 64) == (5, 3, 16, 64)


def test_auto_takes_the_native_backend_and_says_so(native_cache):
    resolved = resolve("auto", device=CPU, cache_dir=native_cache)
    assert (resolved.backend.name, resolved.requested) == ("native", "auto")
    assert resolved.reason
    assert not resolved.fallback


def test_auto_without_a_compiler_falls_back_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    resolved = resolve("auto", device=CPU, cache_dir=tmp_path)
    assert (resolved.backend.name, resolved.fallback) == ("torch", True)
    assert "no cc was found" in resolved.reason
    with pytest.raises(BackendUnavailableError, match="no cc was found"):
        resolve("native", device=CPU, cache_dir=tmp_path)


def test_auto_with_a_compiler_that_fails_falls_back_and_says_why(tmp_path, monkeypatch):
    script(tmp_path / "cc", FAILING_CC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    resolved = resolve("auto", device=CPU, cache_dir=tmp_path / "cache")
    assert (resolved.backend.name, resolved.fallback) == ("torch", True)
    assert resolved.reason.startswith("plain PyTorch, slower: ")
    assert "cannot make vectors" in resolved.reason


def test_native_on_another_device(tmp_path):
    with pytest.raises(BackendUnavailableError, match="not on cuda"):
        resolve("native", device=torch.device("cuda"), cache_dir=tmp_path)


def test_auto_on_a_device_that_no_kernel_knows(tmp_path):
    resolved = resolve("auto", device=torch.device("meta"), cache_dir=tmp_path)
    assert (resolved.backend.name, resolved.reason) == (
        "torch",
        "plain PyTorch: nothing else for meta",
    )


@pytest.fixture
def hopper(monkeypatch):
    """torch says that it sees one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_triton_on_a_cuda_device(name, hopper, tmp_path):
    pytest.importorskip("triton", reason="triton is made for Linux on x86-64 alone")
    resolved = resolve(name, device=torch.device("cuda"), cache_dir=tmp_path)
    assert (resolved.backend.name, resolved.requested) == ("triton", name)
    assert isinstance(resolved.backend, Backend)


def unavailable(tmp_path: Path, device: str = "cuda") -> str:
    """Why triton is refused there; auto falls back and says the same."""
    with pytest.raises(BackendUnavailableError) as caught:
        resolve("triton", device=torch.device(device), cache_dir=tmp_path)
    if device == "cuda":
        automatic = resolve("auto", device=torch.device(device), cache_dir=tmp_path)
        assert (automatic.backend.name, automatic.fallback) == ("torch", True)
        assert automatic.reason == f"plain PyTorch, slower: {caught.value}"
    return str(caught.value)


def test_triton_on_the_cpu_is_refused(tmp_path):
    assert "runs on a CUDA device, not on cpu" in unavailable(tmp_path, "cpu")


def test_triton_without_a_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none" in unavailable(tmp_path)


def test_triton_on_an_old_device_is_refused(tmp_path, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability (8, 0) or newer, a device has (7, 5)" in unavailable(tmp_path)


def test_triton_that_is_not_installed_is_refused(tmp_path, hopper, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("manyhats_kernels.triton.")]:
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(triton_package, module.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in unavailable(tmp_path)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=", ".join(dispatch.NAMES)):
        resolve("fast", device=CPU, cache_dir=tmp_path)


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path):
    compiler = script(tmp_path / "cc", FAILING_CC)
    cache = tmp_path / "cache"
    with pytest.raises(BackendUnavailableError, match=r"(?s)status 3.*cannot make vectors"):
        native_build.build(compiler, cache)
    assert list(cache.iterdir()) == []


def test_a_compiler_that_cannot_run(tmp_path):
    with pytest.raises(BackendUnavailableError, match="did not run"):
        native_build.build(str(tmp_path / "missing"), tmp_path)


def test_a_library_that_cannot_be_loaded(tmp_path):
    compiler = script(
        tmp_path / "cc",
        '[ "$1" = --version ] && exit 0\nfor last; do :; done\necho garbage > "$last"',
    )
    with pytest.raises(BackendUnavailableError, match="cannot load"):
        native_build.load(native_build.build(compiler, tmp_path))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnavailableError, match="cannot keep native code"):
        native_build.build("cc", tmp_path / "file" / "cache")


def test_the_library_is_compiled_once_and_anew_by_another_compiler(tmp_path):
    log = tmp_path / "log"
    text = 'if [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n'
    text += f'echo run >> {log}\nfor last; do :; done\necho made > "$last"'
    compiler = script(tmp_path / "cc", text.replace("{version}", "1"))
    first = native_build.build(compiler, tmp_path / "cache")
    assert native_build.build(compiler, tmp_path / "cache") == first
    assert log.read_text() == "run\n"
    script(tmp_path / "cc", text.replace("{version}", "2"))
    assert native_build.build(compiler, tmp_path / "cache") != first
    assert log.read_text() == "run\nrun\n"
