"""One good adapter of every family, made by PEFT over a tiny model, as files in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save
from support.sites import describe_plain
from transformers import AutoModelForCausalLM, LlamaConfig

from manyhats.adapters.files import AdapterLimits, parse_weights, read_config
from manyhats.adapters.formats import (
    adalora,
    bitfit,
    compile_adapter,
    ia3,
    ln_tuning,
    prefix,
    tokens,
)
from manyhats.adapters.formats.changes import C3A, FOURIERFT, HIRA, ROAD
from manyhats.adapters.formats.fields import FieldTable
from manyhats.adapters.formats.lora_config import TABLE as LORA_TABLE
from manyhats.adapters.formats.lycoris import LOHA, LOKR
from manyhats.adapters.formats.products import DELORA, HRA, MISS
from manyhats.adapters.formats.prompts import TABLES as PROMPT_TABLES
from manyhats.adapters.formats.rotations import OFT
from manyhats.adapters.formats.vera import VERA
from manyhats.adapters.parts import BaseSpec, CompiledAdapter
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.types import Digest

LIMITS = AdapterLimits()
TARGETS = ["q_proj", "down_proj"]
_KINDS: dict[str, tuple[type[peft.PeftConfig], dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 2, "bias": "all"}),
    "dora": (peft.LoraConfig, {"r": 2, "use_dora": True, "modules_to_save": ["lm_head"]}),
    "lora tokens": (
        peft.LoraConfig,
        {"r": 2, "target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [5]}},
    ),
    "adalora": (peft.AdaLoraConfig, {"init_r": 3, "total_step": 9}),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}),
    "ln_tuning": (peft.LNTuningConfig, {"target_modules": ["input_layernorm", "norm"]}),
    "beft": (peft.BeftConfig, {}),
    "trainable_tokens": (
        peft.TrainableTokensConfig,
        {"token_indices": [4, 2], "target_modules": ["embed_tokens"]},
    ),
    "prompt_tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 3, "target_modules": None}),
    "p_tuning": (
        peft.PromptEncoderConfig,
        {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "target_modules": None},
    ),
    "cpt": (
        peft.CPTConfig,
        {
            "cpt_token_ids": [3, 4],
            "cpt_mask": [1, 1],
            "cpt_tokens_type_mask": [1, 2],
            "target_modules": None,
        },
    ),
    "multitask_prompt_tuning": (
        peft.MultitaskPromptTuningConfig,
        {"num_virtual_tokens": 3, "num_tasks": 1, "num_ranks": 2, "target_modules": None},
    ),
    "prefix_tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 3, "target_modules": None}),
    "cartridge": (peft.CartridgeConfig, {"num_virtual_tokens": 2, "target_modules": None}),
    "vera": (peft.VeraConfig, {"r": 5}),
    "loha": (peft.LoHaConfig, {"r": 2}),
    "lokr": (peft.LoKrConfig, {"r": 2}),
    "delora": (peft.DeloraConfig, {"r": 2}),
    "miss": (peft.MissConfig, {"r": 3}),
    "hra": (peft.HRAConfig, {"r": 2}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4}),
    "hira": (peft.HiraConfig, {"r": 2}),
    "road": (peft.RoadConfig, {"group_size": 4}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 11}),
    "c3a": (peft.C3AConfig, {"block_size": 8}),
}


TABLES: dict[str, FieldTable] = {
    "LORA": LORA_TABLE,
    "ADALORA": adalora.TABLE,
    "IA3": ia3.TABLE,
    "LN_TUNING": ln_tuning.TABLE,
    "BEFT": bitfit.BEFT_TABLE,
    "TRAINABLE_TOKENS": tokens.TABLE,
    "PREFIX_TUNING": prefix.TABLE,
    "CARTRIDGE": prefix.TABLE,
    **PROMPT_TABLES,
    **{
        tuner.name.upper(): tuner.table
        for tuner in (VERA, LOHA, LOKR, DELORA, MISS, HRA, OFT, HIRA, ROAD, FOURIERFT, C3A)
    },
}
"""Every table of fields, by PEFT's name of the family."""


@dataclass(frozen=True, repr=False)
class Good:
    """An adapter that is accepted, and the base that it is for."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    spec: BaseSpec
    weights: LoadedWeights
    model: Any = None

    def attempt(
        self,
        changes: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        limits: AdapterLimits = LIMITS,
        dtype: torch.dtype = torch.bfloat16,
    ) -> CompiledAdapter:
        """Compile a changed copy."""
        found = self.tensors if tensors is None else tensors
        return self.compile(
            json.dumps(self.config | dict(changes or {})).encode(),
            save({name: tensor.contiguous() for name, tensor in found.items()}),
            limits,
            dtype,
        )

    def compile(
        self,
        config: bytes,
        weights: bytes,
        limits: AdapterLimits = LIMITS,
        dtype: torch.dtype = torch.bfloat16,
    ) -> CompiledAdapter:
        """As the server does with two files."""
        return compile_adapter(
            read_config(config, limits),
            parse_weights(weights, limits),
            self.spec,
            limits,
            digest=Digest(hashlib.sha256(config + weights).hexdigest()),
            dtype=dtype,
            base_weights=self.weights,
        )


@cache
def good_adapters() -> Mapping[str, Good]:
    """By name; the base is an untied Llama of two layers with biases."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    spec = describe_plain(model)
    weights = LoadedWeights(site_modules(model, spec))
    found = {}
    for name, (kind, fields) in _KINDS.items():
        merged = {"task_type": "CAUSAL_LM", "target_modules": TARGETS} | fields
        if merged["target_modules"] is None:
            del merged["target_modules"]
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(copy.deepcopy(model), kind(**merged))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
            adapted.save_pretrained(folder)
            text = (Path(folder) / "adapter_config.json").read_text()
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
        found[name] = Good(json.loads(text), tensors, spec, weights, model)
    biases = {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
    found["bitfit"] = Good({"peft_type": "BITFIT"}, biases, spec, weights)
    return found
