"""Products put in the parts' dtype a stack at a time: bit for bit as one by one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from manyhats.adapters.files import AdapterLimits, parse_weights
from manyhats.adapters.formats import compile_adapter, plain
from manyhats.adapters.parts import BaseSpec, SiteKind, SiteSpec
from manyhats.errors import AdapterRejectedError
from manyhats.types import Digest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS, LEAVES = 12, {"q_proj": (8, 12), "k_proj": (8, 6), "o_proj": (12, 8), "up_proj": (8, 12)}
PREFIX = "base_model.model."
SITES = {
    f"model.layers.{layer}.{leaf}": SiteSpec(
        f"model.layers.{layer}.{leaf}", SiteKind.LINEAR, inputs, outputs
    )
    for layer in range(LAYERS)
    for leaf, (inputs, outputs) in LEAVES.items()
}
BASE = BaseSpec(digest="0" * 64, num_layers=LAYERS, sites=SITES)


def config(**changes):
    """Ranks and scalings that differ between layers and modules."""
    return {
        "peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": list(LEAVES),
        "rank_pattern": {"layers.3.q_proj": 1, "k_proj": 2},
        "alpha_pattern": {"layers.5.q_proj": 3, "o_proj": 3},
    } | changes  # fmt: skip


def random_tensors(dtype, ranks):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, site in SITES.items():
        rank = ranks(name)
        a = torch.randn(rank, site.in_features, generator=generator)
        b = torch.randn(site.out_features, rank, generator=generator)
        found[f"{PREFIX}{name}.lora_A.weight"] = a.to(dtype)
        found[f"{PREFIX}{name}.lora_B.weight"] = b.to(dtype)
    return found


def rank_of(name):
    return 1 if name.endswith("layers.3.q_proj") else 2 if name.endswith("k_proj") else 3


def alpha_of(name):
    return 3 if name.endswith(("layers.5.q_proj", "o_proj")) else 7


def compiled(tensors, dtype, **changes):
    weights = parse_weights(save(tensors), AdapterLimits())
    return compile_adapter(
        config(**changes), weights, BASE, AdapterLimits(), digest=Digest("d"), dtype=dtype
    )


@pytest.mark.parametrize("rows", [1, 40, 1 << 19])
@pytest.mark.parametrize("parts", DTYPES)
@pytest.mark.parametrize("file", DTYPES)
def test_stacks_of_any_size_are_bit_for_bit_what_each_tensor_gives_alone(
    file, parts, rows, monkeypatch
):
    monkeypatch.setattr(plain, "_STACK_VALUES", rows)
    tensors = random_tensors(file, rank_of)
    adapter = compiled(tensors, parts)
    assert list(adapter.sites) == list(SITES)
    for name, site in adapter.sites.items():
        a = tensors[f"{PREFIX}{name}.lora_A.weight"]
        b = tensors[f"{PREFIX}{name}.lora_B.weight"]
        factor = alpha_of(name) / rank_of(name)
        assert torch.equal(site.low_rank.a, a.to(torch.float32).to(parts)), name
        assert torch.equal(site.low_rank.b, (b.to(torch.float32).t() * factor).to(parts)), name
        assert site.low_rank.a.is_contiguous()
        assert site.low_rank.b.is_contiguous()


@pytest.mark.parametrize("parts", DTYPES)
@pytest.mark.parametrize("file", DTYPES)
def test_the_file_is_not_written_to(file, parts):
    """Though what needs no arithmetic is a view of it."""
    tensors = random_tensors(file, lambda name: 3)
    for changes in ({}, {"lora_alpha": 3, "alpha_pattern": {"k_proj": 9}}):
        data = bytearray(save(tensors))
        weights = parse_weights(data, AdapterLimits())
        adapter = compile_adapter(
            config(r=3, rank_pattern={}, **changes), weights,
            BASE, AdapterLimits(), digest=Digest("d"), dtype=parts,
        )  # fmt: skip
        assert list(adapter.sites) == list(SITES)
        assert data == save(tensors)


@pytest.mark.parametrize("place", [0, len(SITES) // 2, len(SITES) - 1])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_value_that_does_not_fit_is_refused_by_its_tensor_s_name(place, side):
    tensors = random_tensors(torch.float32, rank_of)
    name = f"{PREFIX}{list(SITES)[place]}.lora_{side}.weight"
    tensors[name][-1, -1] = 65_000 if side == "B" else 70_000
    if side == "B":
        tensors[name][-1, -1] *= 3  # over fp16's largest once scaled, or before
    with pytest.raises(AdapterRejectedError, match="does not fit float16") as caught:
        compiled(tensors, torch.float16)
    assert caught.value.reason == "non_finite"
    assert name in caught.value.message


def test_a_scaling_alone_can_be_too_much():
    tensors = random_tensors(torch.float16, rank_of)
    name = f"{PREFIX}model.layers.7.up_proj.lora_B.weight"
    tensors[name][0, 0] = -60_000
    compiled(tensors, torch.float16, lora_alpha=3)
    with pytest.raises(AdapterRejectedError, match=r"layers\.7\.up_proj\.lora_B.*does not fit"):
        compiled(tensors, torch.float16)
