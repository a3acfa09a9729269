"""LoRA and rsLoRA against PEFT itself: same weights, same tokens, same logits."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch

from manyhats.adapters.parts import SiteKind
from manyhats.engine.model.parts_reference import PartsReference

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_up_proj", "down_proj"]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:k_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|down_proj)))"
)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("list", "llama", {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]}),
    (
        "everything",
        "llama",
        {"r": 3, "lora_alpha": 7, "target_modules": [*QKVO, "gate_proj", "up_proj", "down_proj"]},
    ),
    ("dotted", "llama", {"r": 2, "target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]}),
    ("full name", "llama", {"r": 2, "target_modules": ["model.layers.2.mlp.up_proj"]}),
    ("regex", "llama", {"r": 2, "target_modules": r"model\.layers\.(0|2)\..*(q_proj|down_proj)"}),
    ("lookahead", "llama", {"r": 2, "target_modules": r"^(?!.*mlp)model(?=\.).*\.[kv]_proj$"}),
    ("unsloth", "llama", {"r": 2, "target_modules": UNSLOTH}),
    ("all-linear", "llama", {"r": 2, "target_modules": "all-linear"}),
    (
        "exclude list",
        "llama",
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["up_proj", "0.mlp.down_proj"]},
    ),
    (
        "exclude regex",
        "llama",
        {"r": 2, "target_modules": QKVO, "exclude_modules": r".*\.1\..*|.*k_proj"},
    ),
    ("one layer", "llama", {"r": 2, "target_modules": QKVO, "layers_to_transform": 0}),
    ("layers", "llama", {"r": 2, "target_modules": QKVO, "layers_to_transform": [0, 2]}),
    ("no layers", "llama", {"r": 2, "target_modules": QKVO, "layers_to_transform": []}),
    (
        "layers by name",
        "llama",
        {"r": 2, "target_modules": QKVO, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    (
        "layers by names",
        "gpt2",
        {
            "r": 2,
            "target_modules": ["c_attn"],
            "layers_to_transform": [1],
            "layers_pattern": ["layers", "h"],
        },
    ),
    (
        "full name past layers",
        "llama",
        {
            "r": 2,
            "target_modules": ["q_proj", "model.layers.2.mlp.up_proj"],
            "layers_to_transform": [0],
        },
    ),
    ("rslora", "llama", {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": QKVO}),
    ("float alpha", "llama", {"r": 4, "lora_alpha": 5.5, "target_modules": QKVO}),
    (
        "patterns",
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": QKVO,
            "rank_pattern": {
                r"^model\.layers\.0\..*": 7,
                "q_proj": 2,
                "layers.1.self_attn.k_proj": 3,
            },
            "alpha_pattern": {"v_proj": 11, r"layers\.\d\.self_attn\.[qk]_proj": 5},
        },
    ),
    (
        "rslora patterns",
        "qwen2",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": QKVO,
            "rank_pattern": {"q_proj": 9},
            "alpha_pattern": {"q_proj": 2.5},
        },
    ),
    ("fan_in_fan_out wrong", "llama", {"r": 2, "fan_in_fan_out": True, "target_modules": QKVO}),
    (
        "fused",
        "phi3",
        {"r": 6, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    ),
    ("fused rslora", "phi3", {"r": 6, "use_rslora": True, "target_modules": "all-linear"}),
    ("base with biases", "qwen2", {"r": 4, "target_modules": "all-linear"}),
    (
        "bias lora_only",
        "qwen2",
        {"r": 4, "bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    ),
    ("bias all", "qwen2", {"r": 4, "bias": "all", "target_modules": ["q_proj", "up_proj"]}),
    ("bias none to train", "llama", {"r": 4, "bias": "all", "target_modules": ["q_proj"]}),
    (
        "conv1d",
        "gpt2",
        {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    ),
    ("conv1d wrong flag", "gpt2", {"r": 4, "target_modules": ["c_attn"]}),
    ("conv1d all-linear", "gpt2", {"r": 4, "fan_in_fan_out": True, "target_modules": "all-linear"}),
    (
        "conv1d bias all",
        "gpt2",
        {"r": 4, "bias": "all", "fan_in_fan_out": True, "target_modules": ["c_attn", "mlp.c_proj"]},
    ),
    (
        "conv1d bias lora_only",
        "gpt2",
        {"r": 4, "bias": "lora_only", "fan_in_fan_out": True, "target_modules": ["c_fc"]},
    ),
    ("no task", "llama", {"r": 2, "task_type": None, "target_modules": QKVO}),
    ("dropout", "llama", {"r": 2, "lora_dropout": 0.5, "target_modules": QKVO}),
    ("gaussian", "llama", {"r": 2, "init_lora_weights": "gaussian", "target_modules": QKVO}),
    ("orthogonal", "llama", {"r": 4, "init_lora_weights": "orthogonal", "target_modules": QKVO}),
    ("mica", "llama", {"r": 4, "init_lora_weights": "mica", "target_modules": QKVO}),
]


@pytest.mark.parametrize(("base", "fields"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_logits_equal_those_of_peft(base, fields, bases, train):
    saved = train(base, **fields)
    compiled = saved.compile(bases[base].spec)

    assert (saved.logits - bases[base].logits).abs().max() > 0.05, (
        "an adapter without effect proves nothing"
    )
    torch.testing.assert_close(bases[base].served(compiled), saved.logits, rtol=1e-4, atol=1e-4)
    assert compiled.family == ("rslora" if fields.get("use_rslora") else "lora")
    assert compiled.digest == "d" * 64


def test_the_words_all_linear_mean_what_peft_makes_of_them(bases, train):
    """PEFT writes the names it found; a configuration may hold the words themselves."""
    for base in ("llama", "gpt2"):
        saved = train(base, r=2, target_modules="all-linear", fan_in_fan_out=base == "gpt2")
        assert isinstance(saved.config["target_modules"], list)
        by_names = saved.compile(bases[base].spec)
        by_words = saved.compile(bases[base].spec, {"target_modules": "All-Linear"})
        assert by_words.sites.keys() == by_names.sites.keys()
        linear = {s.name for s in bases[base].spec.sites.values() if s.kind is SiteKind.LINEAR}
        assert by_words.sites.keys() == linear


def test_parts_are_contiguous_of_the_dtype_asked_for(bases, train):
    saved = train("gpt2", r=1, bias="all", fan_in_fan_out=True, target_modules=["c_attn"])
    exact = saved.compile(bases["gpt2"].spec)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compiled = saved.compile(bases["gpt2"].spec, dtype=dtype)
        attention = compiled.sites["transformer.h.1.attn.c_attn"].low_rank
        assert (attention.a.shape, attention.b.shape) == ((1, 32), (1, 96))
        for name, parts in compiled.sites.items():
            want = exact.sites[name]
            tensors = [(parts.bias, want.bias)] if parts.bias is not None else []
            if parts.low_rank is not None:
                tensors += [
                    (parts.low_rank.a, want.low_rank.a),
                    (parts.low_rank.b, want.low_rank.b),
                ]
            for tensor, wanted in tensors:
                assert tensor.dtype == dtype
                assert tensor.is_contiguous()
                # Rank rows may be views of the file, or lie side by side.
                own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                assert own or tensor is not parts.bias
                torch.testing.assert_close(tensor, wanted.to(dtype), rtol=0, atol=0)


def test_the_scaling_is_folded_before_the_only_rounding(bases, train):
    """s * bf16(B) would round twice; a scaling that is no power of two shows it."""
    saved = train("llama", r=7, lora_alpha=3, target_modules=["q_proj"])
    compiled = saved.compile(bases["llama"].spec, dtype=torch.bfloat16)
    b = saved.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    wanted = (b * (3 / 7)).T.to(torch.bfloat16)
    assert torch.equal(compiled.sites["model.layers.0.self_attn.q_proj"].low_rank.b, wanted)


def test_a_bias_that_training_left_alone_is_no_part(bases, tmp_path):
    """bias="all" saves every bias of the model; only those that differ cost anything."""
    model = peft.get_peft_model(
        copy.deepcopy(bases["qwen2"].model),
        peft.LoraConfig(r=2, bias="all", target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.k_proj.bias.add_(0.5)
    model.save_pretrained(tmp_path)
    from_disk = json.loads((tmp_path / "adapter_config.json").read_text())
    assert from_disk["bias"] == "all"

    compiled = _compile(tmp_path, bases["qwen2"].spec)
    biased = [name for name, parts in compiled.sites.items() if parts.bias is not None]
    assert biased == ["model.layers.1.self_attn.k_proj"]
    torch.testing.assert_close(compiled.sites[biased[0]].bias, torch.full((16,), 0.5))


def test_layer_norm_biases_become_parts_of_the_norms(bases, train):
    saved = train("gpt2", r=2, bias="all", fan_in_fan_out=True, target_modules=["c_attn"])
    names = saved.tensors.keys()
    assert "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias" in names
    assert "base_model.model.transformer.h.0.ln_1.bias" in names
    compiled = saved.compile(bases["gpt2"].spec)
    assert compiled.sites["transformer.h.0.ln_1"].low_rank is None
    assert compiled.sites["transformer.h.0.ln_1"].bias is not None
    assert compiled.sites["transformer.ln_f"].bias is not None


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_pissa_adapter_is_served_on_the_original_base(bases, tmp_path):
    """PEFT's own conversion turns PiSSA into LoRA of twice the rank over the untouched base."""
    model = peft.get_peft_model(
        copy.deepcopy(bases["llama"].model),
        peft.LoraConfig(r=3, init_lora_weights="pissa", target_modules=QKVO, task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        wanted = model.eval()(input_ids=torch.tensor([[5, 4, 3]]), use_cache=False).logits
    model.save_pretrained(
        tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )

    compiled = _compile(tmp_path / "final", bases["llama"].spec)
    assert compiled.max_rank == 6
    assert compiled.metadata["rank"] == "6"
    base = bases["llama"]
    served = PartsReference(base.model, base.spec, compiled).logits([5, 4, 3])
    torch.testing.assert_close(served, wanted[0], rtol=1e-4, atol=1e-4)


def test_metadata_shows_ranks_and_origin(bases, train):
    saved = train("llama", r=4, target_modules=QKVO, rank_pattern={"q_proj": 2})
    compiled = saved.compile(bases["llama"].spec, {"base_model_name_or_path": "some/base"})
    assert compiled.metadata["rank"] == "2-4"
    assert compiled.metadata["base_model_name_or_path"] == "some/base"
    assert compiled.metadata["peft_version"] == peft.__version__
    assert compiled.max_rank == 4
    assert list(compiled.sites) == [n for n in bases["llama"].spec.sites if n in compiled.sites]


def _compile(folder, spec):
    from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
    from manyhats.adapters.formats import compile_adapter

    limits = AdapterLimits()
    config = read_config_file(folder / "adapter_config.json", limits)
    weights = read_weights(folder / "adapter_model.safetensors", limits)
    return compile_adapter(config, weights, spec, limits, digest="d" * 64, dtype=torch.float32)
