"""The paged KV cache's tensors: one pair a layer, in the kernel backend's layout."""

from __future__ import annotations

import logging
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
_CPU_IDLE_SHARE = 8
"""Of so many blocks one may lie idle with content at first; see ``BlockManager``."""

logger = logging.getLogger(__name__)


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


def idle_blocks(num_blocks: int, device: torch.device) -> int | None:
    """``BlockManager``'s argument: on a CPU a block's memory is resident from its first use on."""
    return max(1, num_blocks // _CPU_IDLE_SHARE) if device.type == "cpu" else None


def report(num_blocks: int, block_size: int, block_bytes: int, device: torch.device) -> None:
    """Logs the cache's size, and warns where a CPU has less memory free than that: what is
    reserved there is only taken as blocks are used, so it would be missing later.
    """
    size = num_blocks * block_bytes
    on_cpu = device.type == "cpu"
    logger.info(
        "KV cache: %d blocks of %d tokens, %.0f MiB%s",
        num_blocks,
        block_size,
        size / 2**20,
        ", resident as they are used" if on_cpu else "",
    )
    available = psutil.virtual_memory().available
    if on_cpu and size > available:
        logger.warning(
            "the KV cache may take %.0f MiB and only %.0f are free: the system may end the server "
            "when it fills; lower kv_cache_mb",
            size / 2**20,
            available / 2**20,
        )


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
