"""Every specialization of the 4-bit kernels that the launchers' tables lead to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from aot.compiler import Case

from manyhats_kernels.triton import quant, quant_kernels
from manyhats_kernels.triton.tiles import TileTable

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def _quant(nested: bool) -> dict[str, Any]:
    return {
        "packed": "*u8",
        "code": "*fp32",
        "absmax": "*u8" if nested else "*fp32",
        "nested_code": "*fp32" if nested else None,
        "nested_scale": "*fp32" if nested else None,
        "nested_offset": "*fp32" if nested else None,
        "RUN": 64,
        "NESTED": 256 if nested else 0,
    }


def _expand(dtype: str, parts: int) -> dict[str, Any]:
    pointers = ("slots", "segment_slots", "segment_offsets", "start_of", "count_of")
    sizes = ("num_segments", "pool_rows", "stride_b", "stride_shrunk", "width")
    if not parts:
        return {**dict.fromkeys((*pointers, "shrunk", "b")), **dict.fromkeys(sizes, "i32")}
    return {
        **dict.fromkeys(pointers, "*i32"),
        **dict.fromkeys(sizes, "i32"),
        "stride_b": "i32:16",
        "stride_shrunk": "i32:16",
        "shrunk": "*fp32",
        "b": POINTERS[dtype],
    }


def matmul(
    tile: quant.MatmulTile, dtype: str, block_k: int, *, nested: bool, parts: int, split: bool
) -> Case:
    """The product's kernel for a tile of the table."""
    flags = {"nested": nested, f"expand{parts}": parts, "split": split}
    return Case(
        "-".join(
            [f"matmul4-t{tile.block_t}-k{block_k}-{dtype}", *(f for f, on in flags.items() if on)]
        ),
        quant_kernels.matmul_kernel,
        {
            "out": POINTERS[dtype],
            "parts": "*fp32" if split else None,
            "x": POINTERS[dtype],
            "bias": None,
            "num_tokens": "i32",
            "n_out": "i32:16",
            "n_in": "i32:16",
            "stride_x": "i32:16",
            **_quant(nested),
            **_expand(dtype, parts),
            "PARTS": parts,
            "SPLIT": split,
            "BLOCK_N": tile.block_n,
            "BLOCK_T": tile.block_t,
            "BLOCK_K": block_k,
            "BLOCK_R": quant.RANK_BLOCK,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "EXPAND_PRECISION": "ieee" if dtype == "fp32" else "tf32",
        },
        tile.warps,
        tile.stages,
        fusion=False,
        tensor_cores=dtype != "fp32",
    )


def cases(table: TileTable) -> Iterator[Case]:
    """Each tile with all that takes registers; a plain one; smaller steps along K; the others.

    An expand adds up as many parts as the largest split of a shrink for few tokens has.
    """
    decode = [t for t in table.rows if (t.op, t.phase) == ("shrink", "decode")]
    most = {bits: max(t.split for t in decode if t.bits == bits) for bits in (16, 32)}
    for tile in quant.MATMUL_TILES:
        dtype, parts = "bf16" if tile.bits == 16 else "fp32", most[tile.bits]
        yield matmul(tile, dtype, tile.block_k, nested=True, parts=parts, split=True)
    first = quant.MATMUL_TILES[0]
    yield matmul(first, "bf16", first.block_k, nested=False, parts=0, split=False)
    yield matmul(first, "fp16", 32, nested=True, parts=0, split=True)
    last = quant.tile_for(64, torch.bfloat16)
    yield Case(
        "dequantize4-bf16-nested",
        quant_kernels.dequantize_kernel,
        {
            "out": "*bf16",
            "num_values": "i32:16",
            "BLOCK": quant.DEQUANTIZE_BLOCK,
            **_quant(True),
        },
        warps=8,
        fusion=False,
    )
    yield Case(
        "reduce4-bf16",
        quant_kernels.reduce_kernel,
        {
            "out": "*bf16",
            "parts": "*fp32",
            "bias": "*bf16",
            "num_tokens": "i32",
            "n_out": "i32:16",
            "num_parts": "i32",
            "BLOCK": quant.REDUCE_BLOCK,
        },
    )
    yield Case(
        "expand4-bf16",
        quant_kernels.expand_kernel,
        {
            "out": "*bf16",
            "num_tokens": "i32",
            "n_out": "i32:16",
            **_expand("bf16", most[16]),
            "PARTS": most[16],
            "BLOCK_N": last.block_n,
            "BLOCK_T": last.block_t,
            "BLOCK_R": quant.RANK_BLOCK,
            "PRECISION": "tf32",
        },
        warps=last.warps,
        tensor_cores=True,
    )
