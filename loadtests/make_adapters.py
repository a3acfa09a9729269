"""Generates LoRA adapters with random weights in PEFT's format, for load tests.

    python loadtests/make_adapters.py --config MODEL_FOLDER/config.json --count 32 --rank 16
    --targets all --out DIR

They are repeatable (the weights follow from the name and the seed) and weak: B is drawn so that an
adapter moves a projection's output by about ``--scale`` of its size, so a model that wears one
still writes sane text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

TARGETS: Mapping[str, tuple[str, ...]] = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""Sets of projections by the name that the command line takes."""


def projection_shapes(config: Mapping[str, Any]) -> dict[str, tuple[str, int, int]]:
    """Projection to (its parent module, in, out) for a Llama-shaped configuration.

    Raises KeyError.
    """
    hidden, ffn = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    return {
        "q_proj": ("self_attn", hidden, q),
        "k_proj": ("self_attn", hidden, kv),
        "v_proj": ("self_attn", hidden, kv),
        "o_proj": ("self_attn", q, hidden),
        "gate_proj": ("mlp", hidden, ffn),
        "up_proj": ("mlp", hidden, ffn),
        "down_proj": ("mlp", ffn, hidden),
    }


def random_tensors(
    config: Mapping[str, Any], rank: int, targets: Sequence[str], scale: float, seed: int
) -> dict[str, torch.Tensor]:
    """PEFT-named bf16 tensors: A [rank, in] and B [out, rank].

    A's entries have variance 1/in, so that A x has unit entries for an x of unit entries; B's have
    variance (scale / sqrt(rank))^2, so that B A x has entries of about ``scale``. lora_alpha equals
    the rank.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = projection_shapes(config)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(int(config["num_hidden_layers"])):
        for target in targets:
            parent, inputs, outputs = shapes[target]
            site = f"base_model.model.model.layers.{layer}.{parent}.{target}"
            a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            b = torch.randn(outputs, rank, generator=generator) * (scale / math.sqrt(rank))
            tensors[f"{site}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{site}.lora_B.weight"] = b.to(torch.bfloat16)
    return tensors


def adapter_config(base: str, rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """The adapter_config.json of such an adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(targets),
    }


def make_adapters(
    config_path: Path,
    out: Path,
    *,
    count: int,
    rank: int,
    targets: str = "all",
    scale: float = 0.02,
    seed: int = 0,
    prefix: str | None = None,
    base: str = "base",
    progress: bool = True,
) -> list[Path]:
    """Writes ``count`` adapter folders under ``out`` and returns them. One that is there already is
    kept.

    A folder's name tells its shape (``bench-all-r16-007``) unless ``prefix`` is given.
    """
    config = json.loads(config_path.read_text(encoding="utf-8"))
    start = prefix or f"bench-{targets}-r{rank}"
    folders = []
    for index in tqdm(range(count), desc=f"making {start}", unit="adapter", disable=not progress):
        folder = out / f"{start}-{index:03d}"
        folders.append(folder)
        if (folder / "adapter_config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(f"{seed}/{folder.name}".encode()).digest()
        tensors = random_tensors(
            config, rank, TARGETS[targets], scale, int.from_bytes(digest[:7], "big")
        )
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # Last, because its presence says that the folder is whole.
        text = json.dumps(adapter_config(base, rank, TARGETS[targets]), indent=2)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--config", type=Path, required=True, help="the base model's config.json")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--count", type=int, default=32)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--targets", choices=sorted(TARGETS), default="all")
    p.add_argument("--scale", type=float, default=0.02, help="size of the change a projection sees")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--prefix", help="folder names; default: bench-TARGETS-rRANK")
    p.add_argument("--base", default="base", help="base_model_name_or_path to write")
    args = p.parse_args(argv)
    folders = make_adapters(
        args.config,
        args.out,
        count=args.count,
        rank=args.rank,
        targets=args.targets,
        scale=args.scale,
        seed=args.seed,
        prefix=args.prefix,
        base=args.base,
    )
    print(f"{len(folders)} adapters under {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
