"""The engine over a 4-bit base on a backend that adds the low-rank products while it multiplies.

In Triton's interpreter, or on a GPU where there is one.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.device import DEVICE
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.fourbit import in_four_bits
from support.graphs import engine_of, logits_of, with_graphs
from support.models import VOCAB, tiny_tokenizer
from support.oracle import Oracle
from support.random_parts import Draw, low_rank
from support.triton_backend import SMALL, triton_backend
from transformers import AutoModelForCausalLM, Qwen2Config

from manyhats.adapters.parts import CompiledAdapter, SiteKind, SiteParts
from manyhats.engine import graphs
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.fourbit import read_four_bits
from manyhats.types import Digest
from manyhats_kernels.cpu import TorchBackend
from manyhats_kernels.triton import quant
from manyhats_kernels.triton.attention import TritonAttention
from manyhats_kernels.triton.backend import TritonBackend
from manyhats_kernels.triton.lora import Launcher

# Biases at q, k and v. Runs of 64 values end with their rows: bitsandbytes' own AVX512 kernel, by
# which the plain weights are made, reads others wrong.
CONFIG = Qwen2Config(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
WORN = {"all": (3, "proj"), "q and v": (17, "q_proj v_proj"), "down": (1, "down_proj")}
"""Ranks and the names of sites. With the last adapter, whose rank is 5, they take all slots."""

PROMPTS = [[5, 9, 33, 7], [4], [70, 8, 2], [150, 3], [44, 3, 9], [9, 100]]
NAMES = ["all", None, "q and v", "last", "down", None]


class Apart(TritonBackend):
    """The same products in two calls."""

    matmul_4bit_lora_group = None


def apart():
    return Apart(TorchBackend(), Launcher(SMALL, "any"))


def for_graphs():
    """With the attention that takes static plans."""
    return TritonBackend(TritonAttention(), Launcher(SMALL, "any"))


@pytest.fixture(scope="module")
def models():
    """In 4 bits, and the same weights in plain layers."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.12
            parameter.add_(noise) if parameter.ndim == 1 else parameter.copy_(noise)
    return in_four_bits(model)


def adapters(base):
    made = {}
    for seed, (name, (rank, sites)) in enumerate(WORN.items()):
        draw = Draw(seed)
        made[name] = {
            site.name: SiteParts(low_rank=low_rank(site, draw, rank))
            for site in base.spec.sites.values()
            if site.kind is SiteKind.LINEAR and any(part in site.name for part in sites.split())
        }
    draw = Draw(9)
    made["last"] = {
        site.name: SiteParts(
            low_rank=low_rank(site, draw, 5),
            bias=draw(site.out_features, scale=0.3),
            output_scale=draw(site.out_features, scale=0.3, mean=1),
        )
        for site in base.spec.sites.values()
        if site.kind is SiteKind.LINEAR
    }
    draw = Draw(10)
    made["scaled"] = {
        site.name: SiteParts(input_scale=draw(site.in_features, scale=0.3, mean=1))
        for site in base.spec.sites.values()
        if site.name.endswith("down_proj")
    }
    return {n: CompiledAdapter(Digest(n), "made by hand", sites) for n, sites in made.items()}


def started(models, home, monkeypatch, backend, slots=4):
    """An engine whose base's layers have the backend's own 4-bit product, four adapters loaded."""
    one = backend()
    model = copy.deepcopy(models[0])
    read_four_bits(model, one)
    return engine_of(model, home, adapters, monkeypatch, lambda: one, slots=slots, pool_rows=40)


@pytest.fixture
def products(monkeypatch):
    """Of each product read at 4 bits: its tokens, and whether an expand was its epilogue."""
    seen, sound = [], quant.fused

    def watched(x, weight, bias, expand, *rest):
        seen.append((x.shape[0], expand is not None))
        return sound(x, weight, bias, expand, *rest)

    monkeypatch.setattr(quant, "fused", watched)
    return seen


def test_a_mixed_batch_is_that_of_both_apart_and_of_the_plain_weights(
    models, home, monkeypatch, products
):
    """Base rows, worn slots without rows at some sites, the last slot, ragged ranks, a bias and a
    scale beside the rows; steps with prompts in them and decodes.
    """
    sampling = params(3, ignore_eos=True, logprobs=5)
    logits, outputs = [], []
    for backend in (triton_backend, apart):
        with started(models, home, monkeypatch, backend) as engine:
            engine.generate(PROMPTS[:4], params(1), [*WORN, "last"])  # so that all are there
            products.clear()
            logits.append(logits_of(engine))
            outputs.append(engine.generate(PROMPTS, sampling, NAMES))
            assert_at_rest(engine)
        tokens = sum(len(p) for p in PROMPTS)
        epilogue = backend is triton_backend
        assert products == [(t, epilogue) for t in (tokens, 6, 6) for _ in range(7)]
    for together, alone in zip(*logits, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert not torch.equal(together, alone)  # rounded once, not twice
    oracle = Oracle(models[1], engine.engine.base.spec)
    for prompt, name, output in zip(PROMPTS, NAMES, outputs[0], strict=True):
        expected, scores = oracle.greedy(prompt, engine.adapters.get(name), 3)
        assert output.token_ids == expected, name
        for got, right in zip(output.logprobs, scores, strict=True):
            for token, logprob in got.top:
                assert abs(logprob - float(right[token])) < 1e-3, name


def test_only_where_a_worn_adapter_has_rows(models, home, monkeypatch, products):
    with started(models, home, monkeypatch, triton_backend) as engine:
        found = {}
        for name in (None, "down", "q and v"):
            engine.generate(PROMPTS[:1], params(1), [name])
            products.clear()
            engine.generate([[7]], params(2, ignore_eos=True), [name])
            found[name] = [epilogue for _, epilogue in products]
        q_k_v_o_gate_up_down = {
            None: [False] * 7,
            "down": [False] * 6 + [True],
            "q and v": [True, False, True] + [False] * 4,
        }
        for name, layer in q_k_v_o_gate_up_down.items():
            assert found[name] == layer * 2, name


def test_long_steps_and_scaled_inputs_are_made_apart(models, home, monkeypatch, products):
    with started(models, home, monkeypatch, triton_backend, slots=5) as engine:
        prompt = [3 + i % 90 for i in range(quant.EXPAND_UP_TO + 1)]
        products.clear()  # of the probing pass
        outputs = engine.generate([prompt], params(1), ["all"])
        assert products == [(len(prompt), False)] * 7
        oracle = Oracle(models[1], engine.engine.base.spec)
        assert outputs[0].token_ids == oracle.greedy(prompt, engine.adapters["all"], 1)[0]
        engine.generate(PROMPTS[:1], params(1), ["scaled"])
        products.clear()
        names = ["all", "scaled"]
        outputs = engine.generate(PROMPTS[:2], params(2, ignore_eos=True), names)
        assert products[-7:] == [(2, True)] * 6 + [(2, False)]  # x of down_proj is scaled
        for prompt, name, output in zip(PROMPTS[:2], names, outputs, strict=True):
            assert output.token_ids == oracle.greedy(prompt, engine.adapters[name], 2)[0], name


def test_in_graphs_the_bits_are_those_of_eager_steps(models, home, monkeypatch, products):
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 0)
    logits = []
    for captured in (False, True):
        engine = started(models, home, monkeypatch, for_graphs)
        stand_in = with_graphs(engine) if captured else None
        with engine:
            engine.generate(PROMPTS[:4], params(1), [*WORN, "last"])
            logits.append(logits_of(engine))
            engine.generate(PROMPTS[:4], params(2, ignore_eos=True), NAMES[:4])
    assert stand_in.sizes == [4]
    assert (4, True) in products
    assert len(logits[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


@pytest.mark.gpu
def test_end_to_end_in_bf16(models, home, monkeypatch, products):
    """On a GPU: graphs have the bits of eager steps, and both are those of the products apart."""
    logits = {}
    for way in ("eager", "graphs", "apart"):
        with monkeypatch.context() as patch:
            if way == "apart":
                patch.setattr(TritonBackend, "matmul_4bit_lora_group", None)
            model = in_four_bits(copy.deepcopy(models[1]).to(torch.bfloat16))[0]
            kernels = resolve_kernels("triton", device=DEVICE, home=home)
            read_four_bits(model, kernels.backend)
            base = base_of(model, tiny_tokenizer())
            settings = {"kernels": "triton", "cuda_graphs": way == "graphs", "slots": 4}
            engine = LocalEngine(base, home, adapters(base), **settings)
            with engine:
                engine.generate(PROMPTS[:4], params(1), [*WORN, "last"])
                products.clear()
                logits[way] = logits_of(engine)
                outputs = engine.generate(PROMPTS, params(20, ignore_eos=True), NAMES)
                assert [o.error for o in outputs] == [None] * len(NAMES)
                graphs_made = len(its._graphs) if (its := engine.engine.loop._runner._fast) else 0
            assert graphs_made == (way == "graphs")
            assert any(epilogue for _, epilogue in products) == (way != "apart")
    assert all(torch.equal(a, b) for a, b in zip(logits["eager"], logits["graphs"], strict=True))
    first, other = logits["eager"][0].float(), logits["apart"][0].float()
    assert (first - other).square().mean().sqrt() < 0.02 * other.square().mean().sqrt()
