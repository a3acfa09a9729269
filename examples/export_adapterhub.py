"""Writes what AdapterHub's library `adapters` saved as one folder that Manyhats registers.

    python export_adapterhub.py OUT mine
    python export_adapterhub.py OUT first second --stack
    python export_adapterhub.py OUT one two --fusion my-fusion

`mine`, `first`, ... are folders of `model.save_adapter`, `my-fusion` one of
`model.save_adapter_fusion`, whose members are given in its order. OUT gets `adapter_config.json`
and `adapter_model.safetensors`. Needs torch and safetensors, and no model. Run it where the
adapters were trained: a `pytorch_adapter.bin` is a pickle, which is read here (tensors alone, with
`weights_only`) and never by the server.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ADAPTER = ("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
FUSION = (
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    "pytorch_model_adapter_fusion.bin",
)
# the library names a prefix once more in every layer
REPEATED = ".pool.prefix_tunings."
HEAD = "head_config.json"


def read(folder: Path, names: tuple[str, str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tensors of one saved folder."""
    config_name, safe, pickled = names
    config = json.loads((folder / config_name).read_text("utf-8"))
    if (folder / safe).exists():
        tensors = load_file(folder / safe)
    else:
        tensors = torch.load(folder / pickled, map_location="cpu", weights_only=True)
    return config, {k: v.contiguous() for k, v in tensors.items() if REPEATED not in k}


def export(out: Path, folders: list[Path], fusion: Path | None = None) -> None:
    """Write one adapter, a stack of several, or with `fusion` the fusion of them, to `out`."""
    for folder in folders:
        if (folder / HEAD).exists():
            raise SystemExit(
                f"{folder} has a prediction head ({HEAD}), which is not served: save the adapter "
                "with with_head=False if its head was not trained"
            )
    read_all = [read(folder, ADAPTER) for folder in folders]
    config: dict[str, Any] = read_all[0][0]
    tensors: dict[str, Any] = {}
    for _, found in read_all:
        tensors |= found
    if fusion is not None or len(folders) > 1:
        config = {
            "composition": "stack" if fusion is None else "fuse",
            "adapters": [member for member, _ in read_all],
            "model_name": config.get("model_name"),
        }
    if fusion is not None:
        saved, found = read(fusion, FUSION)
        config["fusion"] = {"name": saved["name"], "config": saved["config"]}
        tensors |= found
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Export AdapterHub adapters for Manyhats.")
    parser.add_argument("out", type=Path)
    parser.add_argument("adapter", type=Path, nargs="+")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--stack", action="store_true", help="several, one after the other")
    way.add_argument("--fusion", type=Path, help="the folder of save_adapter_fusion")
    args = parser.parse_args()
    if len(args.adapter) > 1 and not args.stack and args.fusion is None:
        parser.error("several adapters need --stack or --fusion")
    export(args.out, args.adapter, args.fusion)


if __name__ == "__main__":
    main()
