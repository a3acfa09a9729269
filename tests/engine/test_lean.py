"""Heavy imports: what they find missing meanwhile, and that all is as before afterwards."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from manyhats.engine.model.lean import lean_imports


def forget_triton(monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_start_brings_along_neither_triton_nor_optimizers():
    """In a process of its own: what this one has imported already proves nothing."""
    code = (
        "import sys, manyhats.app as _, transformers.generation.utils; "
        "print(*sorted({'scipy', 'triton'} & sys.modules.keys())); "
        "import scipy.special, torch; print(torch.compile.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, after = ran.stdout.splitlines()
    assert loaded == ("triton" if torch.cuda.is_available() else "")
    assert after == "compile"


@pytest.mark.parametrize("cuda", [False, True])
def test_what_is_not_needed_is_hidden_while_it_lasts(cuda, monkeypatch):
    forget_triton(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    compiler = torch.compile
    with lean_imports():
        assert ("triton" in sys.modules) is not cuda
        assert sys.modules.get("triton") is None
        assert torch.compile(abs) is abs
    assert torch.compile is compiler
    assert "triton" not in sys.modules


def test_what_is_there_already_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", sys)
    with lean_imports():
        assert importlib.import_module("triton") is sys
    assert sys.modules["triton"] is sys


def test_it_is_undone_after_an_error(monkeypatch):
    forget_triton(monkeypatch)
    compiler = torch.compile

    def fail():
        with lean_imports():
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert torch.compile is compiler
    assert "triton" not in sys.modules
