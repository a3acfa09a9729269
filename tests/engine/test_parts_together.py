"""Who shares the batch changes no bit; what cannot be served fails alone; what goes frees its
room.
"""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import VOCAB, tiny_model, tiny_tokenizer
from support.oracle import Oracle
from support.random_parts import KINDS, Draw, bottleneck, low_rank, random_adapter

from manyhats.adapters.parts import CompiledAdapter, Fusion, LowRank, Prefix, SiteParts
from manyhats.errors import AdapterLoadError
from manyhats.types import Digest

HIDDEN = 48
FIXED = ("soft prompt", "prefix")  # these change the batch's shape


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def base(model):
    return base_of(copy.deepcopy(model), tiny_tokenizer())


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCAB, (7,), generator=generator).tolist() for _ in range(count)]


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_others_change_no_bit(base, home, kernels):
    """Every other row wears another adapter the second time: the rest have the very same scores."""
    kinds = [None, *KINDS, None]
    adapters = {f"{k} {seed}": random_adapter(k, base.spec, seed) for k in KINDS for seed in (0, 1)}
    settings = {"slots": len(adapters), "pool_rows": 800, "prefix_cache": False}
    settings |= {"kernels": kernels, "max_num_seqs": len(kinds)}
    sampling = params(3, ignore_eos=True, logprobs=20)
    with LocalEngine(base, home, adapters, **settings) as engine:
        engine.generate(prompts(len(adapters)), sampling, list(adapters))  # all are there now
        runs = []
        for seed in (0, 1):
            wear = [
                None if k is None else f"{k} {seed if i % 2 and k not in FIXED else 0}"
                for i, k in enumerate(kinds)
            ]
            runs.append(engine.generate(prompts(len(kinds)), sampling, wear))
        with_none = [None if k not in FIXED else f"{k} 0" for k in kinds]
        runs.append(engine.generate(prompts(len(kinds)), sampling, with_none))
        assert_at_rest(engine)
    for index, kind in enumerate(kinds):
        same = runs[0][index].logprobs == runs[1][index].logprobs
        assert same == (index % 2 == 0 or kind is None or kind in FIXED), kind
        alone = runs[0][index].logprobs == runs[2][index].logprobs
        assert alone == (kind is None or kind in FIXED), kind


def adapter(sites: dict[str, SiteParts], virtual: int = 0) -> CompiledAdapter:
    digest = hashlib.sha256(repr(sorted(sites)).encode() + repr(sites).encode()).hexdigest()
    return CompiledAdapter(Digest(digest), "made by hand", sites, virtual_tokens=virtual)


def bad_adapters(base) -> dict[str, CompiledAdapter]:
    """By what the error says."""
    draw = Draw(3)
    q, after = "model.layers.1.self_attn.q_proj", "model.layers.1.after_mlp"
    site = base.spec.sites[after]
    square = draw(HIDDEN, HIDDEN)
    one = bottleneck(site, draw)
    return {
        "gain is no part": adapter({q: SiteParts(gain=draw(HIDDEN))}),
        "soft_prompt is no part": adapter({q: SiteParts(soft_prompt=draw(2, HIDDEN))}, 2),
        "is no site": adapter({"model.layers.9.self_attn.q_proj": SiteParts(bias=draw(HIDDEN))}),
        r"dense of .* has the shape": adapter({q: SiteParts(dense=draw(HIDDEN, HIDDEN - 1))}),
        "exclude each other": adapter(
            {after: SiteParts(bottlenecks=(bottleneck(site, draw, parallel=True, of_output=True),))}
        ),
        "without skip": adapter(
            {
                after: SiteParts(
                    bottlenecks=(bottleneck(site, draw, skip=False),),
                    fusion=Fusion(square, square, None),
                )
            }
        ),
        "fusion has no bottlenecks": adapter(
            {after: SiteParts(fusion=Fusion(square, square, None))}
        ),
        r"must both be \[width, 48\]": adapter(
            {after: SiteParts(bottlenecks=(bottleneck(site, draw, up=one.up[:-1]),))}
        ),
        "the prefix has 3 tokens": adapter(
            {"model.layers.0.self_attn": SiteParts(prefix=Prefix(draw(3, 2, 8), draw(3, 2, 8)))}, 4
        ),
        "cannot be loaded": adapter({q: SiteParts(input_scale=draw(HIDDEN + 1))}),
        r"over the bound of 1 MiB \(override_mb\)": adapter(
            {"model.embed_tokens": SiteParts(soft_prompt=draw(6000, HIDDEN))}
        ),
        "rank rows at site": adapter(
            {q: SiteParts(low_rank=LowRank(draw(99, HIDDEN), draw(99, HIDDEN)))}
        ),
    }


def test_what_cannot_be_served_fails_alone(base, model, home):
    bad = bad_adapters(base)
    good = {kind: random_adapter(kind, base.spec) for kind in ("everything", "prefix")}
    names = [*good, None, *bad]
    with LocalEngine(base, home, bad | good, override_mb=1, pool_rows=64, slots=4) as engine:
        for _ in range(2):
            outputs = engine.generate(prompts(len(names)), params(2, ignore_eos=True), names)
            for name, prompt, output in zip(names, prompts(len(names)), outputs, strict=True):
                if name in bad:
                    assert isinstance(output.error, AdapterLoadError), name
                    with pytest.raises(AdapterLoadError, match=name):
                        raise output.error
                else:
                    expected, _ = Oracle(model, base.spec).greedy(prompt, good.get(name), 2)
                    assert output.token_ids == expected
        assert_at_rest(engine)


def test_whole_tensors_give_way_when_the_budget_is_full(base, model, home):
    """Six adapters of four pages each, room for sixteen: those that nobody wears go, and leave
    nothing.
    """
    linear = [n for n in base.spec.sites if n.endswith(("_proj", "lm_head"))]
    made = {}
    for seed in range(6):
        draw = Draw(seed)
        sites = {
            n: SiteParts(dense=draw(s.out_features, s.in_features, scale=0.12))
            for n in linear
            for s in [base.spec.sites[n]]
        }
        made[f"a{seed}"] = CompiledAdapter(Digest(f"{seed:064}"), "made by hand", sites)
    assert made["a0"].nbytes > 3 * (1 << 16)
    oracle = Oracle(model, base.spec)
    with LocalEngine(base, home, made, override_mb=1, slots=8) as engine:
        for _ in range(2):
            outputs = engine.generate(prompts(6), params(2, ignore_eos=True), list(made))
            for prompt, name, output in zip(prompts(6), made, outputs, strict=True):
                assert output.token_ids == oracle.greedy(prompt, made[name], 2)[0], name
        evicted = sum(
            engine.metrics_value("manyhats_adapter_evictions_total", adapter=n, tier="device")
            for n in made
        )
        resident = engine.engine.client.stats().resident
        assert evicted > 0
        assert len(resident) < len(made)
        assert_at_rest(engine)


def test_a_slot_keeps_nothing_of_the_adapter_before(base, model, home):
    """One has parts everywhere; the next in its slot has one part alone, and its neighbour keeps
    every site busy.
    """
    one = "model.layers.0.self_attn.q_proj"
    small = adapter({one: SiteParts(low_rank=low_rank(base.spec.sites[one], Draw(1)))})
    made = {
        "big": random_adapter("everything", base.spec),
        "fused": random_adapter("fusion", base.spec),
        "neighbour": random_adapter("everything", base.spec, 1),
        "small": small,
    }
    oracle = Oracle(model, base.spec)
    sampling = params(3, ignore_eos=True)
    with LocalEngine(base, home, made, slots=2) as engine:
        for first in ("big", "fused"):
            engine.generate(prompts(2), sampling, [first, "neighbour"])
            names = ["small", "neighbour"]
            outputs = engine.generate(prompts(2), sampling, names)
            for prompt, name, output in zip(prompts(2), names, outputs, strict=True):
                assert output.token_ids == oracle.greedy(prompt, made[name], 3)[0], (first, name)
