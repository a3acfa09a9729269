"""The paged KV cache's tensors: one pair a layer, in the kernel backend's layout."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from torch import nn

from manyhats.engine.attention import AttentionShape, PagedAttention
from manyhats.engine.step import StepState
from manyhats.errors import ConfigError
from manyhats_kernels import Backend

_CPU_SHARE = 0.25
_CPU_CAP_BYTES = 4 << 30
_CUDA_SHARE = 0.8


def bytes_per_token(shapes: Sequence[AttentionShape], dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    return sum(2 * s.kv_heads * s.head_dim * dtype.itemsize for s in shapes)


def choose_num_blocks(
    shapes: Sequence[AttentionShape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int,
    kv_cache_mb: int | None,
    kv_cache_blocks: int | None,
    max_num_seqs: int,
    context_len: int,
) -> int:
    """How many blocks to hold: a setting, or a share of free memory, never more than could be used.

    Raises ConfigError where a size that was set does not hold one block.
    """
    if kv_cache_blocks is not None:
        return kv_cache_blocks
    per_block = bytes_per_token(shapes, dtype) * block_size
    useful = max_num_seqs * -(-context_len // block_size)
    if kv_cache_mb is not None:
        blocks = (kv_cache_mb << 20) // per_block
        if blocks < 1:
            raise ConfigError(
                f"kv_cache_mb: {kv_cache_mb} MiB holds not one block of {block_size} tokens, "
                "which takes "
                f"{-(-per_block >> 20)} MiB",
                param="kv_cache_mb",
            )
        return min(blocks, useful)
    if device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    else:
        budget = min(int(psutil.virtual_memory().available * _CPU_SHARE), _CPU_CAP_BYTES)
    return max(1, min(budget // per_block, useful))


def allocate(
    layers: Sequence[tuple[nn.Module, AttentionShape]],
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    state: StepState,
) -> None:
    """Allocates every layer's cache and hands it to the layer's attention module."""
    for module, shape in layers:
        dims = backend.kv_cache_shape(num_blocks, block_size, shape.kv_heads, shape.head_dim)
        # torch.empty: on a CPU the pages cost nothing until a block is first used.
        k_cache = torch.empty(dims, dtype=dtype, device=device)
        v_cache = torch.empty(dims, dtype=dtype, device=device)
        module.manyhats_attention = PagedAttention(backend, state, k_cache, v_cache)  # type: ignore[assignment]
