"""Small random models, real PEFT adapters over them, and ours applied by hooks."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.parts import BaseSpec, CompiledAdapter, SiteKind, SiteSpec
from manyhats.types import Digest

IDS = torch.tensor([[3, 71, 15, 9, 26, 5, 35, 8], [96, 7, 93, 2, 38, 46, 26, 43]])


def _configs() -> dict[str, Any]:
    common = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return {
        "llama": transformers.LlamaConfig(**common, **sizes),
        "qwen2": transformers.Qwen2Config(**common, **sizes),
        "phi3": transformers.Phi3Config(**common, **sizes),
        "gpt2": transformers.GPT2Config(**common, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    }


def describe(model: Any) -> BaseSpec:
    """The model as the importers see it."""
    sites = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach().float().clone()
        if isinstance(module, torch.nn.Linear):
            kind = SiteKind.HEAD if module is head else SiteKind.LINEAR
            spec = SiteSpec(name, kind, module.in_features, module.out_features, bias=bias)
        elif isinstance(module, Conv1D):
            spec = SiteSpec(name, SiteKind.LINEAR, module.nx, module.nf, transposed=True, bias=bias)
        elif isinstance(module, torch.nn.Embedding):
            spec = SiteSpec(name, SiteKind.EMBEDDING, module.num_embeddings, module.embedding_dim)
        elif "Norm" in type(module).__name__:
            size = module.weight.numel()
            spec = SiteSpec(name, SiteKind.NORM, size, size, bias=bias)
        else:
            continue
        sites[name] = spec
    return BaseSpec(digest="0" * 64, num_layers=model.config.num_hidden_layers, sites=sites)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of the fixed prompt, without gradients."""
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def apply_parts(model: torch.nn.Module, compiled: CompiledAdapter) -> list[Any]:
    """Hook the parts onto a model: y += (x A^T) B + bias. Returns the hooks' handles."""
    modules = dict(model.named_modules())
    handles = []
    for name, parts in compiled.sites.items():

        def hook(_module: Any, args: Any, out: torch.Tensor, parts: Any = parts) -> torch.Tensor:
            if parts.low_rank is not None:
                out = out + (args[0] @ parts.low_rank.a.T) @ parts.low_rank.b
            return out if parts.bias is None else out + parts.bias

        handles.append(modules[name].register_forward_hook(hook))
    return handles


@dataclass(frozen=True)
class Base:
    """A base model, what the importers know of it and its own logits."""

    model: Any
    spec: BaseSpec
    logits: torch.Tensor

    def served(self, compiled: CompiledAdapter) -> torch.Tensor:
        """Logits of the base with the compiled adapter on it."""
        handles = apply_parts(self.model, compiled)
        try:
            return logits(self.model)
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Saved:
    """What PEFT wrote, and the logits of the model that wrote it."""

    folder: Path
    logits: torch.Tensor

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter_config.json").read_text())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")

    def compile(
        self,
        spec: BaseSpec,
        changes: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        limits: AdapterLimits = AdapterLimits(),  # noqa: B008
    ) -> CompiledAdapter:
        config = read_config_file(self.folder / "adapter_config.json", limits) | dict(changes or {})
        weights = read_weights(self.folder / "adapter_model.safetensors", limits)
        return compile_adapter(config, weights, spec, limits, digest=Digest("d" * 64), dtype=dtype)


@pytest.fixture(scope="session")
def bases() -> dict[str, Base]:
    """Random models with weights large enough, and biases unequal enough, for errors to show."""
    found = {}
    for name, config in _configs().items():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.3)
                elif parameter.dim() == 2:
                    parameter.normal_(std=0.15)
        model.requires_grad_(False)
        found[name] = Base(model, describe(model), logits(model))
    return found


def randomize(model: torch.nn.Module, bias: str) -> None:
    """As if trained: A, B and whatever biases are trainable."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or (
                bias != "none" and name.endswith(".bias") and parameter.requires_grad
            ):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture(scope="session")
def train(bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """``train("llama", r=4, ...)``: an adapter that PEFT made, changed at random and saved."""

    def make(name: str, **fields: Any) -> Saved:
        fields = {"task_type": "CAUSAL_LM", "init_lora_weights": True} | fields
        folder = tmp_path_factory.mktemp("adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about flags that it corrects
            model = peft.get_peft_model(copy.deepcopy(bases[name].model), peft.LoraConfig(**fields))
            randomize(model, fields.get("bias", "none"))
            model.eval().save_pretrained(folder)
        return Saved(folder, logits(model))

    return make
