"""The parity probe: right adapters of every kind of part pass, a wrong pool is seen."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of
from support.models import tiny_model, tiny_tokenizer
from support.random_parts import random_adapter

from manyhats.engine.parity import Unregistered
from manyhats.errors import AdapterLoadError, AdapterRejectedError
from manyhats.types import AdapterRef, Digest

KINDS = ("scales and more", "everything", "gain", "norm bias", "soft prompt", "head rows",
         "embedding rows", "embedding low_rank", "dense", "fusion", "stack")  # fmt: skip


def check(engine, adapter):
    ref = AdapterRef("new", 1, Digest(f"unregistered-{adapter.digest}"), adapter.virtual_tokens)
    return engine.engine.parity.check(ref, adapter)


@pytest.fixture(scope="module")
def base():
    return base_of(copy.deepcopy(tiny_model("llama")), tiny_tokenizer())


@pytest.fixture
def engine(base, home):
    with LocalEngine(base, home, {}, kernels="native") as engine:
        engine.engine.loop._deliver = engine.engine.client._postbox.deliver
        yield engine
        assert_at_rest(engine)


def test_every_kind_of_part_agrees(engine, base):
    weights = {n: p.detach().clone() for n, p in base.module.named_parameters()}
    for kind in KINDS:
        parity = check(engine, random_adapter(kind, base.spec))
        assert parity is not None, kind
        assert parity.agrees, (kind, parity)
    for name, parameter in base.module.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_prefix_is_not_compared(engine, base):
    assert check(engine, random_adapter("prefix", base.spec)) is None


@pytest.mark.parametrize("wrong", ["rows", "scale", "nothing"])
def test_a_pool_that_differs_is_seen_with_its_numbers(engine, base, monkeypatch, wrong):
    pool = engine.engine.residency._pool
    write = pool.write

    def bad(slot, starts, adapter):
        if wrong == "nothing":
            return
        write(slot, starts, adapter)
        for site in pool.sites:
            weights = getattr(site, "weights", None)
            if weights is None or site.spec.name.rpartition(".")[2] != "down_proj":
                continue
            if wrong == "rows":
                weights.b.copy_(weights.b.roll(1, 0))
            else:
                weights.b.mul_(1.1)

    monkeypatch.setattr(pool, "write", bad)
    with pytest.raises(AdapterRejectedError, match=r"parity_mismatch: .*relative error") as refusal:
        check(engine, random_adapter("low_rank", base.spec))
    assert refusal.value.reason == "parity_mismatch"


def test_it_leaves_nothing_behind_and_needs_a_running_engine(base, home):
    local = LocalEngine(base, home, {})
    adapter = random_adapter("low_rank", base.spec)
    assert check(local, adapter) is None
    with local as engine:
        engine.engine.loop._deliver = engine.engine.client._postbox.deliver
        assert check(engine, adapter) is not None
        engine.engine.loop.between_steps(lambda: None).result(10)
        assert engine.engine.residency.residents() == ()
        assert engine.engine.residency.host.bytes_used == 0
    assert LocalEngine(base, home, {}, parity_probe=False).engine.parity is None


def test_what_is_held_is_found_and_gone_afterwards(base):
    def lost(digest):
        raise AdapterLoadError(digest)

    loader = Unregistered(lost)
    adapter = random_adapter("gain", base.spec)
    with loader.hold(adapter):
        assert loader(adapter.digest) is adapter
    with pytest.raises(AdapterLoadError):
        loader(adapter.digest)
