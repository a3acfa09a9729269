"""The step's budget: every part of a decode step is counted once, and their sum is the step."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.engine import LocalEngine, base_of
from support.models import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
step_budget = importlib.import_module("step_budget")


def test_a_part_within_another_is_taken_from_it(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(step_budget, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    inner = SimpleNamespace(work=lambda: None, fails=lambda: 1 / 0)
    outer = SimpleNamespace(work=lambda: [inner.work(), inner.work()])
    clock = step_budget.Clock()
    clock.timed(inner, "work", "inner")
    clock.timed(inner, "fails", "inner")
    clock.timed(outer, "work", "outer")
    outer.work()
    assert clock.spent == {"inner": 2.0, "outer": 3.0}
    with pytest.raises(ZeroDivisionError):
        inner.fails()
    assert clock.spent == {"inner": 3.0, "outer": 3.0}


def test_the_parts_of_a_real_engines_decode_steps(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_budget.runner, "forward", step_budget.runner.forward)
        engine = LocalEngine(
            base_of(tiny_model("llama"), tiny_tokenizer()), tmp_path, max_num_seqs=4
        )
        loop = engine.engine.loop
        loop._deliver = engine.engine.client._postbox.deliver
        app = SimpleNamespace(engine=engine.engine)
        steps = step_budget.watch(app, 4)
        with engine:
            args = SimpleNamespace(input_tokens=9, output_tokens=12, concurrency=4)
            asyncio.run(step_budget.load(app, [None], args))
    assert 8 <= len(steps) <= 11
    for parts in steps:
        assert set(parts) == set(step_budget.PARTS)
        assert min(parts.values()) >= 0
    found = step_budget.report(steps)
    assert found["steps"] == len(steps)
    assert 0 < found["forward_ms"] < found["step_ms"]
    assert 0 < found["outside_share"] < 1
