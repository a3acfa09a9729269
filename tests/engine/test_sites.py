"""What the engine finds out of a base: its residual sites, norms' kinds, embeddings' scale."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engine import base_of
from support.models import CONFIGS, VOCAB, tiny_model, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Olmo2Config,
    PreTrainedConfig,
)

from manyhats.adapters.parts import NormKind, SiteKind
from manyhats.engine.model.norms import norm_kind

HEADS = {"mistral": 8, "qwen3": 16, "gemma3": 8}

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def sites_of(base, kind: SiteKind):
    return [site for site in base.spec.sites.values() if site.kind is kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_found(name, dtype):
    base = base_of(copy.deepcopy(tiny_model(name)).to(dtype), tiny_tokenizer())
    layers = base.spec.num_layers
    residual = [site.name for site in sites_of(base, SiteKind.RESIDUAL)]
    prefix = "transformer.h" if name == "gpt2" else "model.layers"
    assert residual == [
        f"{prefix}.{i}.{place}" for i in range(layers) for place in ("after_attention", "after_mlp")
    ]
    attention = sites_of(base, SiteKind.ATTENTION)
    assert [s.name.rpartition(".")[2] for s in attention] == [
        "attn" if name == "gpt2" else "self_attn"
    ] * layers
    kv_heads = 6 if name == "gpt2" else 2
    assert {(s.in_features, s.out_features) for s in attention} == {(kv_heads, HEADS.get(name, 8))}
    kinds = {(s.norm, s.offset) for s in sites_of(base, SiteKind.NORM)}
    eps = {"gpt2": 1e-5, "phi3": 1e-5}.get(name, 1e-6)
    assert kinds == {(NormKind(eps, name == "gpt2"), float(name == "gemma3"))}
    for site in sites_of(base, SiteKind.EMBEDDING):
        expected = torch.tensor(48**0.5 if name == "gemma3" else 1.0).to(dtype)
        assert site.scale == float(expected)


OTHERS: dict[str, PreTrainedConfig] = {
    "scaled output": GraniteConfig(**SMALL, residual_multiplier=0.5),
    "norm behind the block": Olmo2Config(**SMALL),
    "attention and mlp side by side": CohereConfig(**SMALL),
    "other names": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if "key_value" not in k}),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_a_layer_that_is_wired_in_another_way_has_no_residual_sites(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base = base_of(model, tiny_tokenizer())
    assert sites_of(base, SiteKind.RESIDUAL) == []
    assert len(sites_of(base, SiteKind.ATTENTION)) == 2, "all else is served"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Odd(nn.Module):
    """A norm of no known kind: its weight is squared."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (16,), self.weight**2, self.eps)


def test_a_norm_of_no_known_kind_is_none():
    assert norm_kind(_Odd()) == (None, 0.0)


def test_a_head_names_the_embedding_that_it_shares_its_weight_with():
    for name, tied in (("llama", None), ("gpt2", "transformer.wte")):
        (head,) = sites_of(
            base_of(copy.deepcopy(tiny_model(name)), tiny_tokenizer()), SiteKind.HEAD
        )
        assert head.tied_to == tied
