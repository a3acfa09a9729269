"""The base's weights as the importers read them back, quantized or not, and DoRA over them."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from support.models import tiny_model
from support.sites import describe_plain

from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.engine.model.parts_reference import PartsReference
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.types import Digest

IN, OUT = 128, 96


def linear4(quant_type: str, *, nested: bool, packed: bool, dtype=torch.bfloat16):
    torch.manual_seed(3)
    plain = torch.nn.Linear(IN, OUT).to(dtype)
    module = bnb.nn.Linear4bit(
        IN, OUT, compute_dtype=dtype, quant_type=quant_type, compress_statistics=nested
    )
    module.load_state_dict(plain.state_dict())
    module = module.to("cpu").eval()
    module.weight = module.weight.to("cpu")
    module.support_avx512bf16_for_cpu = packed
    return module


def read(module: torch.nn.Module) -> torch.Tensor:
    return LoadedWeights({"x": module}).weight("x")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_four_bits_are_what_the_layer_multiplies_by(quant_type, nested, packed):
    module = linear4(quant_type, nested=nested, packed=packed)
    x = torch.eye(IN, dtype=torch.bfloat16)
    with torch.no_grad():
        y = module(x) - module.bias
    assert getattr(module.weight.quant_state, "packing_format_for_cpu", False) is packed
    weight = read(module)
    assert (weight.shape, weight.dtype) == ((OUT, IN), torch.float32)
    assert weight.unique().numel() > 16
    with torch.no_grad():
        # one output at a time is one product, so only the bias' rounding is left
        torch.testing.assert_close(y.t().float(), weight, rtol=2e-2, atol=4e-3)


def test_the_packed_layout_is_undone_value_by_value():
    """Against the weight before it was packed: only the block scales' rounding to bf16 differs."""
    plain, packed = (linear4("nf4", nested=False, packed=p) for p in (False, True))
    with torch.no_grad():
        packed(torch.zeros(1, IN, dtype=torch.bfloat16))
    torch.testing.assert_close(read(packed), read(plain), rtol=2**-7, atol=0)


def test_reading_changes_nothing():
    module = linear4("nf4", nested=True, packed=False)
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        before = module(x)
        read(module).zero_()
        assert torch.equal(module(x), before)


def test_eight_bits_are_scaled_by_row():
    torch.manual_seed(4)
    module = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    weight = torch.randn(OUT, IN)
    module.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    module = module.to("cpu")
    rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    wanted = rows.float() * scales.float()[:, None] / 127
    for _ in range(2):  # before and after a pass
        torch.testing.assert_close(read(module), wanted, rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(read(module), weight, rtol=0, atol=3e-2)
        with torch.no_grad():
            module(torch.randn(2, IN, dtype=torch.float16))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_plain_weights_are_logical_copies(name):
    model = tiny_model(name)
    spec = describe_plain(model)
    weights = LoadedWeights(site_modules(model, spec))
    for site in spec.sites.values():
        if site.kind.value in ("linear", "head"):
            assert weights.weight(site.name).shape == (site.out_features, site.in_features)
    first = next(s for s in spec.sites.values() if s.kind.value == "embedding")
    found = weights.weight(first.name)
    assert torch.equal(found, model.get_input_embeddings().weight)
    found.zero_()
    assert weights.weight(first.name).any()


def test_norm_offsets_embedding_scales_and_ties_are_seen():
    gemma = describe_plain(tiny_model("gemma3")).sites
    assert gemma["model.norm"].offset == 1.0
    assert gemma["model.layers.0.self_attn.q_norm"].offset == 1.0
    assert gemma["model.embed_tokens"].scale == pytest.approx(48**0.5)
    assert describe_plain(tiny_model("gpt2")).sites["lm_head"].tied_to == "transformer.wte"
    for name, norm in (("llama", "model.norm"), ("gpt2", "transformer.ln_f")):
        assert describe_plain(tiny_model(name)).sites[norm].offset == 0.0
    llama = describe_plain(tiny_model("llama")).sites
    assert (llama["model.embed_tokens"].scale, llama["lm_head"].tied_to) == (1.0, None)
    attention = llama["model.layers.1.self_attn"]
    assert (attention.in_features, attention.out_features) == (2, 8)
    assert describe_plain(tiny_model("gpt2")).sites["transformer.h.0.attn"].in_features == 6


@pytest.mark.parametrize("packed", [False, True])
def test_dora_over_nf4_is_peft_s_over_the_same_dequantized_weights(packed, tmp_path):
    torch.manual_seed(6)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    plain = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    quantized = {}
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.normal_(std=0.2)
                four = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False,
                    compute_dtype=torch.bfloat16, quant_type="nf4",
                )  # fmt: skip
                four.load_state_dict({"weight": module.weight.bfloat16()})
                four.weight = four.weight.to("cpu")
                four.support_avx512bf16_for_cpu = packed
                four.eval()(torch.zeros(1, module.in_features, dtype=torch.bfloat16))
                quantized[name] = four
                module.weight.copy_(read(four))
    spec = describe_plain(plain)
    model = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(use_dora=True, r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        ids = [3, 71, 15, 9, 26]
        wanted = model.eval()(torch.tensor([ids])).logits[0]
    model.save_pretrained(tmp_path)
    limits = AdapterLimits()
    compiled = compile_adapter(
        read_config_file(tmp_path / "adapter_config.json", limits),
        read_weights(tmp_path / "adapter_model.safetensors", limits),
        spec, limits, digest=Digest("d"), dtype=torch.float32,
        base_weights=LoadedWeights(quantized),
    )  # fmt: skip
    served = PartsReference(plain, spec, compiled).logits(ids)
    torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-4)
