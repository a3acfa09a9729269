"""A tiny base and adapters on disk, and the flags that serve them in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.models import tiny_model, tiny_tokenizer
from support.random_lora import write_random_lora

from manyhats.config import Settings


def write_base(folder: Path) -> Path:
    """A random Llama of three layers with its tokenizer, called by its folder's name."""
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_adapters(root: Path, base: Path, names: Sequence[str], *, seed: int = 0) -> Path:
    """A random LoRA adapter of rank 2 for each name, in folders below ``root``; the first one's
    seed is ``seed``.
    """
    for index, name in enumerate(names):
        targets = ("q_proj", "v_proj")
        write_random_lora(root / name, base, rank=2, targets=targets, seed=seed + index)
    return root


def tiny_settings(home: Path, base: Path, **more: Any) -> Settings:
    """The same as ``tiny_flags`` for an application in the test's own process."""
    exact = {"device": "cpu", "dtype": "fp32", "quantization": "none", "kernels": "torch"}
    return Settings(home=home, model=str(base), **(exact | {"kv_cache_mb": 16} | more))


def tiny_flags(base: Path) -> tuple[str, ...]:
    """Small and exact: fp32, not quantized, without compiled kernels."""
    flags = ("--model", str(base), "--quantization", "none", "--dtype", "fp32")
    return (*flags, "--device", "cpu", "--kernels", "torch", "--kv-cache-mb", "8")
