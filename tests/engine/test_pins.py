"""Pinned adapters on the device: brought without a request, kept against all others, given up."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import tiny_model, tiny_tokenizer

from manyhats.adapters.parts import CompiledAdapter, LowRank, SiteKind, SiteParts
from manyhats.types import Digest

PROMPT = [5, 9, 33, 7]


@pytest.fixture
def engine(tmp_path):
    base = base_of(copy.deepcopy(tiny_model("llama")), tiny_tokenizer())

    def adapter(name):
        generator = torch.Generator().manual_seed(len(name))
        sites = {
            s.name: SiteParts(
                LowRank(
                    torch.randn(2, s.in_features, generator=generator) * 0.1,
                    torch.randn(2, s.out_features, generator=generator) * 0.1,
                )
            )
            for s in base.spec.sites.values()
            if s.kind is SiteKind.LINEAR
        }
        return CompiledAdapter(Digest(name), "lora", sites)

    known = {name: adapter(name) for name in ("a", "bb", "ccc", "dddd")}
    with LocalEngine(base, tmp_path, known, slots=2) as engine:
        yield engine


def residents(engine, wanted):
    """Pins by name on the device, once they are as ``wanted`` (bounded, as nobody posts it)."""
    ends = time.monotonic() + 120
    while True:
        engine.generate([PROMPT], params(1))  # turns the loop, which takes a new snapshot
        found = {r.ref.name: r.pinned for r in engine.engine.client.stats().resident}
        if {n for n, pinned in found.items() if pinned} == wanted or time.monotonic() > ends:
            return found


def test_a_pin_brings_and_keeps_an_adapter(engine):
    residency = engine.engine.residency
    residency.pin(engine.ref("a"))
    residency.pin(engine.ref("a"))
    assert residents(engine, {"a"}) == {"a": True}
    for name in ("bb", "ccc", "dddd", "bb"):
        [output] = engine.generate([PROMPT], params(2, ignore_eos=True), [name])
        assert output.error is None
    assert residents(engine, {"a"})["a"]
    residency.unpin(engine.ref("a"))
    for name in ("ccc", "dddd"):
        engine.generate([PROMPT], params(2, ignore_eos=True), [name])
    assert set(residents(engine, set())) == {"ccc", "dddd"}
    assert_at_rest(engine)


def test_a_pin_waits_until_running_requests_leave_room_and_a_drop_ends_it(engine):
    residency = engine.engine.residency
    running = [
        engine.submit(PROMPT, params(400, ignore_eos=True), adapter=n) for n in ("bb", "ccc")
    ]
    for request in running:
        engine.next_delta(request)
    residency.pin(engine.ref("a"))
    more = engine.submit(PROMPT, params(4, ignore_eos=True), adapter="dddd")
    outputs = engine.wait(*running, more)
    assert [o.error for choices in outputs for o in choices] == [None] * 3
    assert residents(engine, {"a"})["a"]
    residency.drop(engine.ref("a"))
    assert "a" not in residents(engine, set())
    residency.unpin(engine.ref("a"))
    residency.prefetch(engine.ref("a"))
    [output] = engine.generate([PROMPT], params(2, ignore_eos=True), ["a"])
    assert output.error is None
    assert_at_rest(engine)
