"""Which parts of adapters the graphs of decode steps hold, and that they hold them right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.engine import assert_at_rest, params
from support.graphs import NothingIsReadBack, StaticBackend, engine_of, logits_of, with_graphs
from support.models import tiny_model
from support.random_parts import KINDS, random_adapter

from manyhats.adapters.parts import CompiledAdapter, LowRank, SiteParts
from manyhats.engine import graphs
from manyhats.types import Digest
from manyhats_kernels import AdapterBatch, AttentionBatch

PROMPTS = [[5, 9, 33, 7, 12, 60], [4, 100, 8], [70] * 17, [150, 3, 9, 9, 20]]
EAGER = ("dense", "head rows", "head dense", "fusion", "two fused")
EAGER += ("embedding low_rank", "embedding rows", "embedding dense")
"""What is taken one adapter at a time."""

HELD = tuple(kind for kind in KINDS if kind not in EAGER)
BATCHES = {
    "llama": (
        ("scales and more", "gain", None, "gated"),
        ("stack", "parallel", "head low_rank", "norm bias"),
        ("alone", "of_output", "prefix", "soft prompt"),
        ("low_rank", "bias", "input_scale", "output_scale"),
    ),
    "qwen3": (("everything", "gain", None, "norm bias"),),
}


class QuickBackend(StaticBackend):
    """With attention in plain PyTorch, by the plan's tensors, whatever its host fields say."""

    def kv_cache_shape(self, num_blocks, block_size, kv_heads, head_dim):
        return (num_blocks, block_size, kv_heads, head_dim)

    def store_kv(self, k, v, k_cache, v_cache, batch):
        real = batch.slot_mapping >= 0
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.flatten(0, 1)[batch.slot_mapping[real]] = new[real]

    def paged_attention(self, q, k_cache, v_cache, batch, *, scale, **_):
        out = torch.zeros_like(q)
        starts, size = batch.query_start.tolist(), batch.block_size
        for i, context in enumerate(batch.context_lens.tolist()):
            if not context:
                continue
            own, at = slice(starts[i], starts[i + 1]), torch.arange(context)
            block = batch.block_tables[i][at // size].long()
            keys, values = (
                cache[block, at % size].repeat_interleave(q.shape[1] // cache.shape[2], 1)
                for cache in (k_cache, v_cache)
            )
            scores = torch.einsum("qhd,khd->hqk", q[own], keys) * scale
            first = context - scores.shape[1]
            scores[:, at[None] > torch.arange(first, context)[:, None]] = -torch.inf
            out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out


def of_kinds(kinds):
    return lambda base: {kind: random_adapter(kind, base.spec) for kind in kinds if kind}


@pytest.fixture
def eager_never(monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 0)


@pytest.mark.usefixtures("eager_never")
@pytest.mark.parametrize("name", BATCHES)
def test_a_replay_has_the_bits_of_an_eager_step(name, home, monkeypatch):
    """With adapters on the device whose parts no graph could hold, worn by nobody in these steps.

    The last sequence ends first: a step of three is padded to four, and PyTorch's products of four
    rows on a CPU have other bits than those of three.
    """
    kinds = {kind for batch in BATCHES[name] for kind in batch} | set(EAGER)
    names = sorted(kinds - {None})
    sampling = [params(n, ignore_eos=True) for n in (3, 3, 3, 2)]
    steps = []
    for captured in (False, True):
        worn, settings = of_kinds(names), {"slots": 32, "pool_rows": 400}
        engine = engine_of(tiny_model(name), home, worn, monkeypatch, QuickBackend, **settings)
        stand_in = with_graphs(engine) if captured else None
        with engine:
            engine.generate([[5, 9]] * len(names), params(1), names)  # so that all are there
            steps.append(logits_of(engine))
            for batch in BATCHES[name]:
                outputs = engine.generate(PROMPTS, sampling, batch)
                assert [o.error for o in outputs] == [None] * 4
            assert_at_rest(engine)
    assert stand_in.sizes == [4, 4] * len(BATCHES[name])
    for eager, replayed in zip(*steps, strict=True):
        if len(eager) == 4:
            assert torch.equal(eager, replayed)
        else:
            torch.testing.assert_close(eager, replayed, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("eager_never")
def test_what_is_launched_decides_which_graph(home, monkeypatch):
    """Three that do something else at the same site have graphs of their own; a fourth shares."""
    site = "model.layers.1.mlp.up_proj"
    draw = torch.Generator().manual_seed(3)

    def worn(base):
        def some(*shape):
            return torch.randn(shape, generator=draw)

        rows = LowRank(some(3, 48), some(3, 96))
        parts = {
            "rows": SiteParts(low_rank=rows),
            "bias": SiteParts(bias=some(96)),
            "both": SiteParts(low_rank=rows, bias=some(96)),
            "other bias": SiteParts(bias=some(96)),
        }
        return {
            name: CompiledAdapter(Digest(name), "by hand", {site: p}) for name, p in parts.items()
        }

    logits = []
    for captured in (False, True):
        draw.manual_seed(3)
        engine = engine_of(tiny_model("llama"), home, worn, monkeypatch, QuickBackend)
        stand_in = with_graphs(engine) if captured else None
        with engine:
            logits.append(logits_of(engine))
            for name in ("rows", "bias", "both", "other bias"):
                engine.generate(PROMPTS[:1], params(2, ignore_eos=True), [name])
    assert stand_in.captured == 3
    assert stand_in.sizes == [1] * 4
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_which_parts_no_graph_holds(name, home, monkeypatch):
    """A step is eager as soon as one such adapter is worn, and only while it is."""
    engine = engine_of(tiny_model(name), home, lambda _: {}, monkeypatch, slots=2, pool_rows=99)
    its = engine.engine.loop._runner
    spec = engine.engine.base.spec
    pool, state = its._pool, its._state
    rows = random_adapter("low_rank", spec)
    for kind in KINDS:
        for slot, made in enumerate((rows, random_adapter(kind, spec))):
            pool.write(slot, [0] * len(pool.capacity), made)
        taken = {}
        for worn in ([0], [0, 1]):
            begin(state, pool, worn)
            taken[len(worn)] = pool.launches.of(state) is not None
            state.end()
        assert taken == {1: True, 2: kind in HELD}, kind
        pool.clear(1)
        begin(state, pool, [1])
        assert pool.launches.of(state) == 0
        state.end()


def begin(state, pool, slots):
    """A decode step of one sequence a slot."""
    plans = AttentionBatch.build([1] * len(slots), [1] * len(slots), [[0]] * len(slots), 16)
    adapters = AdapterBatch.build(slots, pool.slots)
    state.begin(plans, adapters, pool.sites_of_slot, wanted=np.arange(len(slots)))


class IdleBackend(StaticBackend):
    """Does nothing, so that what the engine itself does with tensors is seen alone."""

    def paged_attention(self, q, k_cache, v_cache, batch, **_):
        return torch.zeros_like(q)

    def nothing(self, *_args, **_options):
        pass

    store_kv = lora_add = lora_add_group = bias_add = scale_rows = norm_rows = nothing
    bottleneck_add = nothing


@pytest.mark.usefixtures("eager_never")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_no_part_reads_a_value_back(name, home, monkeypatch):
    """What is held could be captured, as far as a machine without a GPU tells."""
    captured = []

    def watched(compute):
        with NothingIsReadBack():
            out = compute()
        captured.append(out.shape[0])
        return (lambda: None), out

    engine = engine_of(
        tiny_model(name), home, of_kinds(HELD), monkeypatch, IdleBackend, slots=32, pool_rows=400
    )
    with_graphs(engine, watched, max_num_seqs=32)
    with engine:
        engine.generate([[5, 9]] * len(HELD), params(1), list(HELD))  # so that all are there
        prompts = [PROMPTS[0]] * len(HELD)
        outputs = engine.generate(prompts, params(2, ignore_eos=True), list(HELD))
        assert [o.error for o in outputs] == [None] * len(HELD)
    assert captured == [16 if len(HELD) <= 16 else 32]
