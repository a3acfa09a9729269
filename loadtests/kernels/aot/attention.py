"""Every specialization of the attention kernels that the launchers' table leads to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from aot.compiler import Case

from manyhats_kernels.triton import attention, cache_kernels
from manyhats_kernels.triton import attention_kernels as kernels


def _common(tile: attention.AttentionTile, dtype: str, *, everything: bool) -> dict[str, Any]:
    pointer = f"*{dtype}"
    return {
        "out": pointer,
        "q": pointer,
        "k_cache": pointer,
        "v_cache": pointer,
        "query_start": "*i32",
        "context_lens": "*i32",
        "block_tables": "*i32",
        "stride_qt": "i32:16",
        "stride_qh": "i32:16",
        "stride_qd": 1,
        "stride_block": "i32:16",
        "stride_table": "i32",
        "scale": "fp32",
        "cap": "fp32",
        "window": "i32",
        "CAPPED": everything,
        "WINDOWED": everything,
        "GROUP": 4,
        "DIM": tile.head,
        "HEAD": tile.head,
        "BLOCK_SIZE": 16,
        "BLOCK_KV": tile.block_kv,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }


def prefill(tile: attention.AttentionTile, dtype: str, *, everything: bool) -> Case:
    """A tile of queries, four heads sharing a kv head."""
    return Case(
        f"attention-prefill-head{tile.head}-{dtype}{'-window-cap' if everything else ''}",
        kernels.prefill_kernel,
        {
            **_common(tile, dtype, everything=everything),
            "num_sequences": "i32",
            "MEMBERS": 4,
            "BLOCK_M": tile.block_m,
        },
        tile.warps,
        tile.stages,
        tensor_cores=tile.bits == 16,
    )


def decode(
    tile: attention.AttentionTile, dtype: str, *, everything: bool, direct: bool = False
) -> Case:
    """Single queries, their context shared, or ``direct``: short, and not shared."""
    return Case(
        f"attention-decode-head{tile.head}-{dtype}{'-window-cap' if everything else ''}"
        f"{'-direct' if direct else ''}",
        kernels.decode_kernel,
        {
            **_common(tile, dtype, everything=everything),
            "parts": "*fp32",
            "peaks": "*fp32",
            "totals": "*fp32",
            "BLOCK_M": 16,
            "SPLITS": attention.SPLITS,
            "CHUNK": attention.CHUNK,
            "DIRECT": direct,
        },
        attention.DECODE_WARPS,
        tile.stages,
        tensor_cores=tile.bits == 16,
    )


def cases() -> Iterator[Case]:
    """Each tile for prompts and for decoding, with a window and a soft cap; one plain; the rest."""
    for tile in attention.ATTENTION_TILES:
        dtype = "bf16" if tile.bits == 16 else "fp32"
        yield prefill(tile, dtype, everything=True)
        yield decode(tile, dtype, everything=True)
        if tile.bits == 16:
            yield decode(tile, dtype, everything=False, direct=True)
    yield prefill(attention.tile_for(128, torch.float16), "fp16", everything=False)
    yield Case(
        "attention-merge-bf16",
        kernels.merge_kernel,
        {
            "out": "*bf16",
            "parts": "*fp32",
            "peaks": "*fp32",
            "totals": "*fp32",
            "query_start": "*i32",
            "context_lens": "*i32",
            "num_splits": "i32",
            "window": "i32",
            "WINDOWED": True,
            "DIM": 256,
            "HEAD": 256,
            "SPLITS": attention.SPLITS,
            "CHUNK": attention.CHUNK,
        },
    )
    strides = {f"stride_{t}{d}": "i32:16" for t in "kv" for d in "th"}
    yield Case(
        "store-kv-bf16",
        cache_kernels.store_kernel,
        {
            **dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*bf16"),
            **strides,
            "stride_kd": 1,
            "stride_vd": 1,
            "slot_mapping": "*i64",
            "KV_HEADS": 8,
            "DIM": 128,
            "BLOCK_SIZE": 16,
            "BLOCK": attention.STORE_BLOCK,
        },
    )
