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
from support.sites import describe_plain

from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.parts import BaseSpec, CompiledAdapter
from manyhats.engine.model.parts_reference import PartsReference
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
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
        "tied": transformers.LlamaConfig(**common, **sizes, tie_word_embeddings=True),
        "gemma3": transformers.Gemma3TextConfig(
            **common,
            **sizes,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of the fixed prompt, without gradients."""
    with torch.no_grad():
        # of the prompt itself, without the virtual tokens before it
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


@dataclass(frozen=True)
class Base:
    """A base model, what the importers know of it and its own logits."""

    model: Any
    spec: BaseSpec
    logits: torch.Tensor

    @property
    def weights(self) -> LoadedWeights:
        return LoadedWeights(site_modules(self.model, self.spec))

    def served(self, compiled: CompiledAdapter) -> torch.Tensor:
        """Logits of the base with the compiled adapter on it."""
        worn = PartsReference(self.model, self.spec, compiled)
        return torch.stack([worn.logits(row.tolist()) for row in IDS])


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
        base_weights: LoadedWeights | None = None,
    ) -> CompiledAdapter:
        config = read_config_file(self.folder / "adapter_config.json", limits) | dict(changes or {})
        weights = read_weights(self.folder / "adapter_model.safetensors", limits)
        return compile_adapter(
            config,
            weights,
            spec,
            limits,
            digest=Digest("d" * 64),
            dtype=dtype,
            base_weights=base_weights,
        )


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
                elif key.endswith("weight"):  # a norm's, near what it was
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.requires_grad_(False)
        found[name] = Base(model, describe_plain(model), logits(model))
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


@pytest.fixture(scope="session")
def tune(bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """``tune("llama", peft.IA3Config(...))``: an adapter of any family, changed at random, saved,
    and loaded again by PEFT for its logits.
    """

    def make(
        name: str, config: peft.PeftConfig, *, noise: float = 0.2, forward: Any = logits
    ) -> Saved:
        folder = tmp_path_factory.mktemp("adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about flags that it corrects
            model = peft.get_peft_model(copy.deepcopy(bases[name].model), config)
            disturb(model, noise)
            model.eval().save_pretrained(folder)
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(bases[name].model), folder)
            return Saved(folder, forward(loaded.eval()))

    return make


def disturb(model: torch.nn.Module, noise: float) -> None:
    """As if trained: everything trainable."""
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
