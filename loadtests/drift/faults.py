"""Faulty copies of a LoRA adapter folder: noise, a scaled B, another adapter's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def noisy(source: Path, target: Path, strength: float, seed: int = 0) -> Path:
    """Gaussian noise on every tensor, ``strength`` times the tensor's own standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + (strength * tensor.float().std() * noise).to(tensor.dtype)

    return _changed(source, target, change)


def scaled(source: Path, target: Path, factor: float) -> Path:
    """Every B times ``factor``."""
    return _changed(source, target, lambda name, t: t * factor if "lora_B" in name else t)


def _changed(source: Path, target: Path, change) -> Path:  # noqa: ANN001
    target.mkdir(parents=True)
    shutil.copy(source / "adapter_config.json", target)
    tensors = load_file(source / WEIGHTS)
    save_file({name: change(name, t).contiguous() for name, t in tensors.items()}, target / WEIGHTS)
    return target
