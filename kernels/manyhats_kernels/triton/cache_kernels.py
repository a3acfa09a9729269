"""The body of the write to the paged cache; ``attention.py`` launches it."""

import triton
import triton.language as tl


@triton.jit
def store_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's keys and values to their place in the cache; a token whose place is -1 has none."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(slot_mapping + token)
    if place < 0:
        return
    values = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = values < KV_HEADS * DIM
    head = values // DIM
    column = values % DIM
    block = place // BLOCK_SIZE
    to = ((block * KV_HEADS + head) * BLOCK_SIZE + place % BLOCK_SIZE) * DIM + column
    of_k = k + token * stride_kt + head * stride_kh + column * stride_kd
    of_v = v + token * stride_vt + head * stride_vh + column * stride_vd
    tl.store(k_cache + to, tl.load(of_k, mask=real), mask=real)
    tl.store(v_cache + to, tl.load(of_v, mask=real), mask=real)
