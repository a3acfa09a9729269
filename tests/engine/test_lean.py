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
        "heavy = {'scipy', 'triton', 'boto3', 'torch._dynamo', 'torch.distributed.tensor'}; "
        "print(*sorted(heavy & sys.modules.keys())); "
        "import scipy.special, torch, torch.distributed.tensor; "
        "print(torch.compile.__name__, torch.distributed.is_available()); "
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item()); "
        "from transformers.masking_utils import TransformGetItemToIndex; "
        "print(type(TransformGetItemToIndex()).__module__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, after, compiled, indexing = ran.stdout.splitlines()
    assert set(loaded.split()) <= ({"triton"} if torch.cuda.is_available() else set())
    assert after == "compile True"
    assert compiled == "2.0"
    assert indexing == "torch._dynamo._trace_wrapped_higher_order_op"


def test_a_model_is_built_without_the_compiler():
    code = (
        "import sys, manyhats.app as _, torch; "
        "from manyhats.engine.model.lean import without_compiler; "
        "from transformers import LlamaConfig, LlamaForCausalLM as Model\n"
        "with without_compiler(), torch.device('meta'):\n"
        "    Model(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,"
        " num_hidden_layers=1, num_attention_heads=1))\n"
        "print('torch._dynamo' in sys.modules, '_dynamo' in vars(torch)); "
        "import torch._dynamo.config as real; print(torch._dynamo.config is real); "
        "print(torch._dynamo.optimize.__module__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False", "True", "torch._dynamo.eval_frame"]


def test_who_asks_the_compiler_for_more_than_marks_gets_it():
    code = (
        "import torch; from manyhats.engine.model.lean import without_compiler\n"
        "with without_compiler():\n"
        "    import torch._dynamo.config, torch._dynamo._trace_wrapped_higher_order_op as wrapped\n"
        "    print(wrapped.trace_wrapped.__name__, torch._dynamo.optimize.__name__)\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["trace_wrapped", "optimize", "2.0"]


def test_marks_come_with_and_without_options():
    with lean_imports():
        assert torch.compile(dynamic=True)(abs) is abs


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
