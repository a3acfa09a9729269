"""Makes the fixtures beside it: tiny bases, adapters that AdapterHub saved over them, and the
logits and greedy tokens of AdapterHub's own forward.

Runs in an environment of its own, as ``adapters`` 1.3.0 needs transformers 4.57, not in the tests:

    pip install torch==2.13.0 'transformers==4.57.*' adapters==1.3.0
    python make_fixtures.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters.composition import Fuse, Stack
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[3] / "examples"))
from export_adapterhub import export  # noqa: E402

IDS = [3, 41, 15, 9, 26, 5, 35, 8]
COUNT = 6
COMMON = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BASES = {
    "llama": LlamaConfig(**COMMON, **SIZES),
    "mistral": MistralConfig(**COMMON, **SIZES, head_dim=8, sliding_window=None),
    "gpt2": GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
BOTH = {"mh_adapter": True, "output_adapter": True}
ALL_LORA = {"selfattn_lora": True, "intermediate_lora": True, "output_lora": True}

ADAPTERS: dict[str, tuple[str, Any]] = {
    "houlsby": ("llama", adapters.DoubleSeqBnConfig(reduction_factor=8)),
    "houlsby_b": ("llama", adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="tanh")),
    "houlsby_left_out": (
        "llama",
        adapters.DoubleSeqBnConfig(
            reduction_factor={"0": 4, "default": 8}, non_linearity="gelu", leave_out=[1]
        ),
    ),
    "pfeiffer": ("llama", adapters.SeqBnConfig(reduction_factor=8)),
    "pfeiffer_b": ("llama", adapters.SeqBnConfig(reduction_factor=4, non_linearity="leakyrelu")),
    "adapter_plus": (
        "llama",
        adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0, mh_adapter=True),
    ),
    "parallel": ("llama", adapters.ParBnConfig(reduction_factor=8)),
    "parallel_learned": (
        "llama",
        adapters.ParBnConfig(reduction_factor=8, scaling="learned", **BOTH),
    ),
    "compacter": ("llama", adapters.CompacterConfig(reduction_factor=4)),
    "compacter_pp": (
        "llama",
        adapters.CompacterPlusPlusConfig(
            reduction_factor=4, phm_dim=2, shared_phm_rule=False, factorized_phm_rule=True
        ),
    ),
    "compacter_shared": (
        "llama",
        adapters.CompacterConfig(
            reduction_factor=4, phm_dim=2, shared_W_phm=True, factorized_phm_rule=True, phm_rank=2
        ),
    ),
    "compacter_whole": (
        "llama",
        adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, factorized_phm_W=False),
    ),
    "prefix": ("llama", adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8)),
    "prefix_flat": ("llama", adapters.PrefixTuningConfig(prefix_length=2, flat=True)),
    "lora": (
        "llama",
        adapters.LoRAConfig(r=3, alpha=5, attn_matrices=["q", "k", "v"], **ALL_LORA),
    ),
    "lora_b": ("llama", adapters.LoRAConfig(r=2, alpha=3, attn_matrices=["q"], leave_out=[1])),
    "ia3": ("llama", adapters.IA3Config(alpha=2, output_lora=True)),
    "mam": (
        "llama",
        adapters.MAMConfig(
            adapters.PrefixTuningConfig(prefix_length=2, bottleneck_size=8),
            adapters.ParBnConfig(reduction_factor=8),
        ),
    ),
    "mistral_pfeiffer": ("mistral", adapters.SeqBnConfig(reduction_factor=8)),
    "mistral_prefix": ("mistral", adapters.PrefixTuningConfig(prefix_length=2, flat=True)),
    "gpt2_houlsby": ("gpt2", adapters.DoubleSeqBnConfig(reduction_factor=8)),
    "gpt2_pfeiffer": (
        "gpt2",
        adapters.SeqBnConfig(reduction_factor=8, non_linearity="gelu_new", **BOTH),
    ),
    "gpt2_parallel": ("gpt2", adapters.ParBnConfig(reduction_factor=8, **BOTH)),
    "gpt2_lora": ("gpt2", adapters.LoRAConfig(r=2, alpha=5, attn_matrices=["q", "v"], **ALL_LORA)),
    "gpt2_ia3": ("gpt2", adapters.IA3Config(output_lora=True)),
}
COMPOSITIONS: dict[str, tuple[Any, str | None]] = {
    "stack_bottlenecks": (Stack("houlsby", "pfeiffer", "houlsby_left_out"), None),
    "stack_families": (Stack("lora", "pfeiffer"), None),
    "stack_loras": (Stack("lora_b", "lora"), None),
    "fuse_pfeiffer": (Fuse("pfeiffer", "pfeiffer_b"), "dynamic"),
    "fuse_houlsby": (Fuse("houlsby", "houlsby_b"), "static"),
}


def base_model(name: str) -> Any:
    """Random weights that are exact in bfloat16, which they are kept in."""
    torch.manual_seed(7)
    config = BASES[name]
    config._attn_implementation = "eager"  # the one that masks prefixes right
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 2:
                parameter.copy_(noise * 0.2)
            elif key.endswith("weight"):
                parameter.copy_(1 + noise * 0.2)
            else:
                parameter.copy_(noise * 0.3)
            parameter.copy_(parameter.bfloat16().float())
    folder = HERE / "bases" / name
    folder.mkdir()
    state = {k: v.bfloat16() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight.bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return model


def randomize(model: Any, marks: tuple[str, ...], seed: int) -> None:
    """As if trained: signed weights, biases and scalars, none left as it was initialised."""
    generator = torch.Generator().manual_seed(seed)
    found = 0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(mark in key for mark in marks):
                noise = torch.randn(parameter.shape, generator=generator)
                shared = "phm_rule" in key or ".W_" in key or key.endswith(".W")
                parameter.add_(noise * (0.6 if shared else 0.3))
                found += 1
    assert found


@torch.no_grad()
def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the prompt, and the greedy tokens after it, each from a whole forward."""

    def logits(tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]

    tokens = list(IDS)
    for _ in range(COUNT):
        tokens.append(int(logits(tokens)[-1].argmax()))
    return logits(IDS).contiguous(), torch.tensor(tokens[len(IDS) :])


def save(model: Any, name: str, folder: Path) -> None:
    """As a user does: prefixes cannot be saved as safetensors (their tensors are shared between
    the layers), so those are exported.
    """
    if "prefix" not in name and name != "mam":
        model.save_adapter(str(folder), name, with_head=False, use_safetensors=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model.save_adapter(f"{scratch}/{name}", name, with_head=False)
        export(folder, [Path(scratch) / name])


def main() -> None:
    """Writes everything anew."""
    for name in ("bases", "saved", "fusions"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        (HERE / name).mkdir()
    models = {name: base_model(name) for name in BASES}
    expected: dict[str, torch.Tensor] = {}

    def record(name: str, model: Any) -> None:
        expected[f"{name}.logits"], expected[f"{name}.greedy"] = answers(model)

    for name, model in models.items():
        record(name, model)
        adapters.init(model)
    for seed, (name, (base, config)) in enumerate(ADAPTERS.items()):
        model = models[base]
        model.add_adapter(name, config=config)
        randomize(model, (f".{name}.",), seed)
        model.set_active_adapters(name)
        record(name, model.eval())
        folder = HERE / "saved" / name
        save(model, name, folder)
    model = models["llama"]
    setups = {}
    for seed, (name, (setup, kind)) in enumerate(COMPOSITIONS.items()):
        if kind is not None:
            model.add_adapter_fusion(setup, kind)
            randomize(model, ("adapter_fusion_layer." + ",".join(setup),), 100 + seed)
            folder = HERE / "fusions" / name
            model.save_adapter_fusion(str(folder), setup, use_safetensors=True)
        model.set_active_adapters(setup)
        record(name, model.eval())
        setups[name] = {"members": list(setup), "fusion": kind is not None}
    save_file(expected, HERE / "expected.safetensors")
    text = json.dumps({"prompt": IDS, "compositions": setups}, indent=2) + "\n"
    (HERE / "cases.json").write_text(text)


if __name__ == "__main__":
    main()
