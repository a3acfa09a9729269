"""Several adapters as one: against PEFT with several active, and against the definition itself."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.random_parts import Draw, bottleneck, low_rank
from support.sites import describe_plain
from transformers import AutoModelForCausalLM, Qwen2Config

from manyhats.adapters.compose import compose
from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.parts import (
    CompiledAdapter,
    Fusion,
    Prefix,
    Rows,
    SiteKind,
    SiteParts,
    SiteSpec,
)
from manyhats.engine.model.parts_reference import PartsReference
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.errors import AdapterRejectedError
from manyhats.lifecycle.compositions import composed
from manyhats.types import AdapterRef, CompositionKind, Digest

LIMITS = AdapterLimits()
IDS = [3, 71, 15, 9, 26, 5, 35, 8]
STACK, WEIGHTED = CompositionKind.STACK, CompositionKind.WEIGHTED
SITE = SiteSpec("model.layers.0.mlp.up_proj", SiteKind.LINEAR, 12, 20)


def put_together(kind, members, weights=(), limits=LIMITS):
    """The members, called a, b and so on, as one."""
    refs = [
        AdapterRef("abcdefgh"[i], 1, Digest(f"{i:064x}"), member.virtual_tokens)
        for i, member in enumerate(members)
    ]
    ref = composed(kind, refs, weights)
    return compose(ref, ref.composition, members, limits)


def adapter(site=SITE.name, virtual=0, **parts):
    return CompiledAdapter(Digest(""), "lora", {site: SiteParts(**parts)}, virtual_tokens=virtual)


# ---- against PEFT


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
    return model.requires_grad_(False)


def lora(**fields):
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5} | fields))


def ia3(*modules):
    return peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[*modules],
        feedforward_modules=[m for m in modules if m == "down_proj"],
    )


PAIRS = {
    "lora, lora": (
        lora(target_modules=["q_proj", "down_proj"]),
        lora(r=2, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "lora, dora": (
        lora(target_modules=["q_proj", "down_proj"]),
        lora(use_dora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "dora, lora": (
        lora(use_dora=True, target_modules=["q_proj", "v_proj"]),
        lora(target_modules=["q_proj", "down_proj"]),
    ),
    "dora, dora": (
        lora(use_dora=True, target_modules=["q_proj"]),
        lora(use_dora=True, target_modules=["q_proj"]),
    ),
    "ia3, ia3": (ia3("k_proj", "down_proj"), ia3("k_proj", "v_proj", "down_proj")),
}


def trained(base, first, second):
    """PEFT's model with adapters a and b, as if both were trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), first, adapter_name="a")
        model.add_adapter("b", second)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".ia3_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def compiled(model, base, folder):
    """Both adapters as the importers make them of PEFT's files."""
    model.save_pretrained(folder)
    spec = describe_plain(base)
    for name in "ab":
        assert load_file(folder / name / "adapter_model.safetensors")
        yield compile_adapter(
            read_config_file(folder / name / "adapter_config.json", LIMITS),
            read_weights(folder / name / "adapter_model.safetensors", LIMITS),
            spec,
            LIMITS,
            digest=Digest(name * 64),
            dtype=torch.float32,
            base_weights=LoadedWeights(site_modules(base, spec)),
        )


def served(base, whole):
    return PartsReference(base, describe_plain(base), whole).logits(IDS)


@torch.no_grad()
def of_peft(model):
    return model(input_ids=torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_stack_is_pefts_several_active_adapters(base, tmp_path, pair):
    model = trained(base, *PAIRS[pair])
    a, b = compiled(model, base, tmp_path)
    model.base_model.set_adapter(["a", "b"])
    wanted = of_peft(model)
    found = served(base, put_together(STACK, [a, b]))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    for alone in (a, b):
        assert not torch.allclose(served(base, alone), wanted, atol=1e-2)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, 0.0)])
def test_a_weighted_sum_is_pefts_cat(base, tmp_path, weights):
    model = trained(base, *PAIRS["lora, lora"])
    a, b = compiled(model, base, tmp_path)
    model.add_weighted_adapter(["a", "b"], list(weights), "both", combination_type="cat")
    model.set_adapter("both")
    whole = put_together(WEIGHTED, [a, b], weights)
    assert torch.allclose(served(base, whole), of_peft(model), rtol=1e-4, atol=1e-4)
    assert whole.sites["model.layers.0.self_attn.q_proj"].low_rank.rank == 5


def test_a_negative_weight_takes_an_adapter_away(base, tmp_path):
    a, _ = compiled(trained(base, *PAIRS["lora, lora"]), base, tmp_path)
    other = replace(a, digest=Digest("c" * 64))
    whole = put_together(WEIGHTED, [a, other], (1.0, -1.0))
    bare = served(base, CompiledAdapter(Digest(""), "none", {}))
    assert torch.allclose(served(base, whole), bare, atol=1e-4)


# ---- against the definition


def layer(parts, below, x):
    """One linear layer that wears ``parts`` over the layer ``below``."""
    scaled = x if parts.input_scale is None else x * parts.input_scale
    y = below(scaled)
    if parts.low_rank is not None:
        y = y + scaled @ parts.low_rank.a.t() @ parts.low_rank.b
    y = y if parts.output_scale is None else y * parts.output_scale
    return y if parts.bias is None else y + parts.bias


def everything(draw):
    return {
        "low_rank": low_rank(SITE, draw),
        "bias": draw(20),
        "input_scale": draw(12, scale=0.3, mean=1),
        "output_scale": draw(20, scale=0.3, mean=-1),
    }


@pytest.mark.parametrize(
    "left_out", [(), ("low_rank",), ("input_scale", "bias"), ("output_scale",)]
)
def test_a_stack_is_one_layer_over_the_other(left_out):
    draw = Draw(3)
    weight, own, x = draw(20, 12), draw(20), draw(7, 12)
    members = [SiteParts(**everything(draw)) for _ in range(3)]
    members[1] = replace(members[1], **dict.fromkeys(left_out))
    wanted = x @ weight.t() + own
    below = lambda x: x @ weight.t() + own  # noqa: E731
    for parts in members:
        below = lambda x, p=parts, b=below: layer(p, b, x)  # noqa: E731
    wanted = below(x)
    adapters = [CompiledAdapter(Digest(""), "x", {SITE.name: parts}) for parts in members]
    [whole] = put_together(STACK, adapters).sites.values()
    found = layer(whole, lambda x: x @ weight.t() + own, x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_weighted_sum_of_biases():
    draw = Draw(4)
    a, b = draw(20), draw(20)
    [whole] = put_together(WEIGHTED, [adapter(bias=a), adapter(bias=b)], (2, -0.5)).sites.values()
    assert torch.equal(whole.bias, 2 * a - 0.5 * b)
    assert whole.low_rank is None


def test_what_comes_one_after_the_other():
    draw = Draw(5)
    site = SiteSpec("model.layers.0.after_mlp", SiteKind.RESIDUAL, 8, 8)
    nets = [bottleneck(site, draw, width=w) for w in (2, 3, 4)]
    members = [
        adapter(site.name, bottlenecks=(nets[0], nets[1])),
        adapter(site.name, bottlenecks=(nets[2],)),
    ]
    [whole] = put_together(STACK, members).sites.values()
    assert whole.bottlenecks == tuple(nets)

    prefixes = [Prefix(draw(n, 2, 4), draw(n, 2, 4)) for n in (2, 3)]
    members = [adapter("attention", len(p.k), prefix=p) for p in prefixes]
    both = put_together(STACK, members)
    assert both.virtual_tokens == 5
    assert torch.equal(both.sites["attention"].prefix.k, torch.cat([p.k for p in prefixes]))
    assert torch.equal(both.sites["attention"].prefix.v, torch.cat([p.v for p in prefixes]))

    soft = [draw(n, 8) for n in (3, 1)]
    both = put_together(STACK, [adapter("embed", len(s), soft_prompt=s) for s in soft])
    assert both.virtual_tokens == 4
    assert torch.equal(both.sites["embed"].soft_prompt, torch.cat(soft))


def test_of_two_rows_the_later_holds():
    draw = Draw(6)
    first, second = draw(3, 8), draw(2, 8)
    rows = [Rows(torch.tensor([1, 4, 9]), first), Rows(torch.tensor([4, 5]), second)]
    [whole] = put_together(STACK, [adapter("embed", rows=r) for r in rows]).sites.values()
    assert whole.rows.token_ids.tolist() == [1, 4, 5, 9]
    wanted = torch.stack([first[0], second[0], second[1], first[2]])
    assert torch.equal(whole.rows.vectors, wanted)


def test_norms_take_one_gain_and_every_bias():
    draw = Draw(7)
    gain, one, two = draw(8), draw(8), draw(8)
    members = [adapter("norm", bias=one), adapter("norm", gain=gain, bias=two)]
    [whole] = put_together(STACK, members).sites.values()
    assert torch.equal(whole.gain, gain)
    assert torch.equal(whole.bias, one + two)


# ---- what is refused


def _fused(draw):
    site = SiteSpec("s", SiteKind.RESIDUAL, 8, 8)
    fusion = Fusion(query=draw(8, 8), key=draw(8, 8), value=None)
    return {"bottlenecks": (bottleneck(site, draw), bottleneck(site, draw)), "fusion": fusion}


D = Draw(8)
CLASHES = {
    "two dense": (STACK, {"dense": D(20, 12)}, {"dense": D(20, 12)}),
    "dense over a product": (STACK, {"low_rank": low_rank(SITE, D)}, {"dense": D(20, 12)}),
    "rows over a product": (
        STACK,
        {"low_rank": low_rank(SITE, D)},
        {"rows": Rows(torch.tensor([1]), D(1, 12))},
    ),
    "two gains": (STACK, {"gain": D(8)}, {"gain": D(8)}),
    "fusion": (STACK, {"bottlenecks": _fused(D)["bottlenecks"]}, _fused(D)),
    "hidden by zero": (
        STACK,
        {"input_scale": torch.tensor([1.0] * 11 + [0.0])},
        {"low_rank": low_rank(SITE, D)},
    ),
    "weighted input scale": (WEIGHTED, {"low_rank": low_rank(SITE, D)}, {"input_scale": D(12)}),
    "weighted output scale": (WEIGHTED, {"bias": D(20)}, {"output_scale": D(20)}),
    "weighted bottlenecks": (WEIGHTED, {}, {"bottlenecks": _fused(D)["bottlenecks"]}),
    "weighted dense": (WEIGHTED, {}, {"dense": D(20, 12)}),
    "weighted rows": (WEIGHTED, {}, {"rows": Rows(torch.tensor([1]), D(1, 12))}),
    "weighted gain": (WEIGHTED, {}, {"gain": D(12)}),
    "weighted soft prompt": (WEIGHTED, {}, {"soft_prompt": D(2, 12)}),
    "weighted prefix": (WEIGHTED, {}, {"prefix": Prefix(D(2, 1, 4), D(2, 1, 4))}),
}


@pytest.mark.parametrize("case", CLASHES)
def test_what_has_no_one_meaning_is_refused(case):
    kind, first, second = CLASHES[case]
    members = [adapter(**first), adapter(**second)]
    with pytest.raises(AdapterRejectedError) as caught:
        put_together(kind, members, (0.5, 0.5) if kind is WEIGHTED else ())
    assert (caught.value.reason, caught.value.status) == ("cannot_compose", 400)
    words = ["b@1", SITE.name, list(second)[-1]]
    if kind is STACK:
        words += ["a@1", list(first)[-1]]
    assert [w for w in words if w not in caught.value.message] == []


def test_a_soft_prompt_and_a_prefix_are_refused():
    members = [
        adapter("embed", 2, soft_prompt=D(2, 8)),
        adapter("attention", 1, prefix=Prefix(D(1, 2, 4), D(1, 2, 4))),
    ]
    with pytest.raises(AdapterRejectedError, match=r"a@1, b@1.*soft prompt and a prefix"):
        put_together(STACK, members)


def test_the_bounds_of_one_adapter_hold():
    two = [adapter(low_rank=low_rank(SITE, D, 5)) for _ in range(2)]
    put_together(STACK, two, limits=AdapterLimits(max_rank=10))
    with pytest.raises(AdapterRejectedError, match=r"stack\(a@1,b@1\) has rank 10 .* bound is 9"):
        put_together(STACK, two, limits=AdapterLimits(max_rank=9))
    soft = [adapter("embed", 2, soft_prompt=D(2, 8)) for _ in range(2)]
    put_together(STACK, soft, limits=AdapterLimits(max_virtual_tokens=4))
    with pytest.raises(AdapterRejectedError, match=r"4 virtual tokens, the bound is 3"):
        put_together(STACK, soft, limits=AdapterLimits(max_virtual_tokens=3))
    dense = [adapter("one", dense=D(4, 4)), adapter("two", dense=D(4, 4))]
    put_together(STACK, dense, limits=AdapterLimits(max_dense_bytes=128))
    with pytest.raises(AdapterRejectedError, match=r"128 bytes, the bound is 127"):
        put_together(STACK, dense, limits=AdapterLimits(max_dense_bytes=127))


def test_what_does_not_fit_the_dtype_is_refused():
    draw = Draw(9, torch.float16, torch.float16)
    members = [adapter(low_rank=low_rank(SITE, draw)), adapter(bias=draw(20))]
    members[0].sites[SITE.name].low_rank.b.mul_(9000)
    with pytest.raises(AdapterRejectedError, match="non_finite"):
        put_together(WEIGHTED, members, (100.0, 1.0))


def test_members_are_not_changed():
    draw = Draw(10)
    members = [adapter(**everything(draw)) for _ in range(2)]
    before = copy.deepcopy(members)
    put_together(STACK, members)
    for member, copied in zip(members, before, strict=True):
        pairs = zip(
            member.sites[SITE.name].tensors(), copied.sites[SITE.name].tensors(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
