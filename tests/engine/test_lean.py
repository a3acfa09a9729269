"""Heavy imports: what they find missing meanwhile, and that all is as before afterwards."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from manyhats.engine.model.lean import lean_imports


def test_what_is_not_needed_is_hidden_while_it_lasts(monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] in ("scipy", "transformers")]:
        monkeypatch.delitem(sys.modules, name)
    compiler = torch.compile
    with lean_imports():
        with pytest.raises(ImportError):
            importlib.import_module("scipy.optimize")
        assert torch.compile(abs) is abs
    assert torch.compile is compiler
    assert importlib.util.find_spec("scipy") is not None


def test_a_transformers_that_may_have_seen_scipy_keeps_it(monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", sys)
    with lean_imports():
        assert "scipy" not in sys.modules
        assert importlib.util.find_spec("scipy") is not None


def test_what_is_there_already_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", sys)
    with lean_imports():
        assert importlib.import_module("scipy") is sys
    assert sys.modules["scipy"] is sys


def test_it_is_undone_after_an_error():
    compiler = torch.compile

    def fail():
        with lean_imports():
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert torch.compile is compiler
    assert None not in (sys.modules.get("scipy", sys), sys.modules.get("triton", sys))
