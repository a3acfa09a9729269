"""Random LoRA adapters, written as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

_SHAPES: dict[Path, dict[str, tuple[int, int]]] = {}


def linear_shapes(model_path: Path) -> Mapping[str, tuple[int, int]]:
    """(in, out) of every linear module of a model's blocks, by name; nothing is loaded."""
    if model_path not in _SHAPES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
        _SHAPES[model_path] = {
            name: (module.nx, module.nf)
            if isinstance(module, Conv1D)
            else (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
            and module is not model.get_output_embeddings()
        }
    return _SHAPES[model_path]


def write_random_lora(
    folder: Path,
    model_path: Path,
    *,
    rank: int,
    targets: Sequence[str],
    seed: int,
    scale: float = 0.02,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """An adapter with signed random A and B at every module whose last name is in ``targets``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (fan_in, fan_out) in linear_shapes(model_path).items():
        if name.rpartition(".")[2] not in targets:
            continue
        key = f"base_model.model.{name}"
        a = torch.randn((rank, fan_in), generator=generator) * scale
        b = torch.randn((fan_out, rank), generator=generator) * scale
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a.to(dtype), b.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder
