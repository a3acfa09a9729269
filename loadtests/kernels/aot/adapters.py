"""Every specialization of the adapters' kernels that the table of tiles leads to.

16-bit tiles are compiled in bf16, 32-bit ones in fp32, as a launch would on tensors whose addresses
and strides are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.compiler import Case

from manyhats_kernels.triton import lora_kernels, row_kernels, rows
from manyhats_kernels.triton.tiles import Tile, TileTable


def cases(table: TileTable) -> Iterator[Case]:
    """Every kernel with every tile; an expand with the largest split it can meet, plain and not."""
    for tile in table.rows:
        if tile.op == "shrink":
            yield lora_case(tile, tile.name, tile.split, between=False)
            continue
        met = (
            t for t in table.rows if (t.op, t.phase, t.bits) == ("shrink", tile.phase, tile.bits)
        )
        split = max(t.split for t in met)
        yield lora_case(tile, f"split{split}-{tile.name}", split, between=False)
        yield lora_case(tile, f"bottleneck-{tile.name}", split, between=True)
    for name, flag in (("bias", False), ("scale", True)):
        yield row_case(name, row_kernels.row_kernel, {"SCALE": flag})
    for name, flag in (("norm-rms", False), ("norm-layer", True)):
        yield row_case(name, row_kernels.norm_kernel, {"CENTERED": flag})


def row_case(name: str, kernel: Any, flags: dict[str, bool]) -> Case:
    """A kernel of row_kernels.py in bf16."""
    constants = {**flags, "BLOCK_N": rows.COLUMNS}
    types = dict.fromkeys(("y", "x", "values", "gain", "shift"), "*bf16")
    types |= {"slots": "*i32", "has": "*i32", "eps": "fp32"}
    arguments = {n: constants.get(n, types.get(n, "i32:16")) for n in kernel.arg_names}
    return Case(name, kernel, arguments, rows.WARPS, 1)


def lora_case(tile: Tile, name: str, split: int, *, between: bool) -> Case:
    """The shrink or expand with ``tile``; ``between`` gives the expand a bottleneck's arguments."""
    shrink = tile.op == "shrink"
    kernel = lora_kernels.shrink_kernel if shrink else lora_kernels.expand_kernel
    value = "*bf16" if tile.bits == 16 else "*fp32"
    known: dict[str, Any] = {
        "BLOCK_T": tile.tokens,
        "BLOCK_R": tile.ranks,
        ("BLOCK_K" if shrink else "BLOCK_N"): tile.span,
        "SPLIT_K": split,
        "PRECISION": "ieee" if shrink or tile.bits == 32 else "tf32x3",
        "mid": "*fp32",
        **dict.fromkeys(("x", "a", "b", "y"), value),
        **dict.fromkeys(("order", "tiles", "start", "count"), "*i32"),
        "kinds": "*i32" if between else None,
        "down_bias": "*fp32" if between else None,
    }

    def argument(name: str) -> Any:
        plain = name.rstrip("012")  # of the three sites that share a launch
        if plain in known:
            return known[plain]
        return "i32:16" if plain.startswith(("stride", "n_")) else "i32"

    return Case(
        name,
        kernel,
        {n: argument(n) for n in kernel.arg_names},
        tile.warps,
        tile.stages,
        chip=tile.chip,
        tensor_cores=tile.bits == 16,
    )
