"""Bodies of the grouped shrink and expand; ``lora.py`` launches them and says what they compute.

A *tile* is a run of at most BLOCK_T tokens of one slot; ``tiles`` holds (slot, begin, end) of each,
places in ``order``, and (0, 0, 0) for one that is only there to keep the grid's size. A launch
serves up to three *sites*: the projections that read the same input. Their arguments come as
triples, of which ``pick`` takes one.

Sums are fp32. ``mid``, fp32 [sites, SPLIT_K, tokens, rank_cap], carries the shrunk tokens from one
kernel to the other: each of the SPLIT_K parts of a row's sum is kept on its own and added up in
order by the expand, so that no atomic makes a result depend on timing. Its rows are the batch's own
tokens, so that the 4-bit product, which takes tokens unsorted, reads them too (``Expand``).
"""

import triton
import triton.language as tl


@triton.jit
def pick(site, first, second, third):
    """The triple's member for ``site``."""
    return tl.where(site == 0, first, tl.where(site == 1, second, third))


@triton.jit
def run_of(slot, start_of, count_of, pool_rows, rank_cap):
    """The slot's first row, the number of its rows, and whether they lie within the pool."""
    start = tl.load(start_of + slot).to(tl.int64)
    count = tl.load(count_of + slot)
    inside = (start >= 0) & (start + count <= pool_rows)
    whole = (count == 0) | ((count > 0) & (count <= rank_cap) & inside)
    return start, count, whole


@triton.jit
def tanh(v):
    """From exp(-2|v|), which cannot overflow."""
    small = tl.exp(-2.0 * tl.abs(v))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(v < 0, -size, size)


@triton.jit
def logistic(v):
    """1 / (1 + exp(-v)), from exp(-|v|)."""
    small = tl.exp(-tl.abs(v))
    return tl.where(v < 0, small, 1.0) / (1.0 + small)


@triton.jit
def activate(v, code):
    """The function at that place of ``backend.ACTIVATIONS``."""
    if code == 0:
        v = tl.maximum(v, 0.0)
    elif code == 1:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif code == 2:
        v = 0.5 * v * (1.0 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)))
    elif code == 3:
        v = v * logistic(v)
    elif code == 4:
        v = tanh(v)
    elif code == 5:
        v = tl.where(v < 0, 0.01 * v, v)
    return v


@triton.jit(do_not_specialize=["num_tokens"])
def shrink_kernel(
    mid, x, order, tiles,
    a0, a1, a2,
    start0, start1, start2,
    count0, count1, count2,
    pool_rows0, pool_rows1, pool_rows2,
    stride_a0, stride_a1, stride_a2,
    stride_x, n_in, num_tokens, rank_cap,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mid[site, part, t, r] = sum over the part's k of x[t, k] * a[start + r, k], t = order[i]."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    site = tl.program_id(2)
    begin = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    if begin >= end:
        return
    slot = tl.load(tiles + 3 * tile)
    start, count, whole = run_of(
        slot,
        pick(site, start0, start1, start2),
        pick(site, count0, count1, count2),
        pick(site, pool_rows0, pool_rows1, pool_rows2),
        rank_cap,
    )
    if not whole:
        return
    stride_a = pick(site, stride_a0, stride_a1, stride_a2).to(tl.int64)
    a = pick(site, a0, a1, a2) + start * stride_a
    places = begin + tl.arange(0, BLOCK_T)
    real = places < end
    tokens = tl.load(order + places, mask=real, other=0).to(tl.int64)
    x_rows = x + tokens[:, None] * stride_x
    mid_rows = mid + ((site * SPLIT_K + part) * num_tokens + tokens)[:, None] * rank_cap
    share = tl.cdiv(tl.cdiv(n_in, SPLIT_K), BLOCK_K) * BLOCK_K
    k_begin = part * share
    k_end = tl.minimum(k_begin + share, n_in)
    for first in range(0, count, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        own = ranks < count
        a_rows = a + ranks[None, :] * stride_a
        sums = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for k in range(k_begin, k_end, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            inside = columns < k_end
            x_part = tl.load(
                x_rows + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0
            )
            a_part = tl.load(
                a_rows + columns[:, None], mask=own[None, :] & inside[:, None], other=0.0
            )
            sums = tl.dot(x_part, a_part, sums, input_precision=PRECISION)
        tl.store(mid_rows + ranks[None, :], sums, mask=real[:, None] & own[None, :])


@triton.jit
def added_up(
    first_part, mask, stride,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """The sum of the SPLIT_K parts of a block, ``stride`` values apart, in their order."""
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(first_part + part * stride, mask=mask, other=0.0)
    return total


@triton.jit
def gate_of(
    mid_rows, real, part_stride, gate_bias, kind, BLOCK_T: tl.constexpr, SPLIT_K: tl.constexpr
):
    """A gated bottleneck's factor of each token, from its last row; 1 without a gate."""
    gate = tl.full((BLOCK_T, 1), 1.0, tl.float32)
    if (kind & 256) != 0:
        gate = logistic(added_up(mid_rows, real, part_stride, BLOCK_T, 1, SPLIT_K) + gate_bias)
    return gate


@triton.jit
def with_ranks(
    sums, mid_rows, b_columns, down_bias, kind, start, count,
    real, inside, part_stride, stride_b,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``sums`` and f(mid) @ b over the slot's rows; b_columns points at its first row."""
    if down_bias is not None:
        last = tl.load(down_bias + start + count - 1)
        gate = gate_of(mid_rows + count - 1, real, part_stride, last, kind, BLOCK_T, SPLIT_K)
    for first in range(0, count, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        own = ranks < count
        shrunk = added_up(
            mid_rows + ranks[None, :], real & own[None, :], part_stride, BLOCK_T, BLOCK_R, SPLIT_K
        )
        if down_bias is not None:
            shrunk += tl.load(down_bias + start + ranks, mask=own, other=0.0)[None, :]
            shrunk = activate(shrunk, kind & 255)
            shrunk = tl.where(ranks[None, :] == count - 1, 1.0, shrunk) * gate
        b_part = tl.load(
            b_columns + ranks[:, None] * stride_b, mask=own[:, None] & inside, other=0.0
        )
        sums = tl.dot(shrunk, b_part.to(tl.float32), sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["num_tokens"])
def expand_kernel(
    mid, order, tiles,
    y0, y1, y2, b0, b1, b2,
    start0, start1, start2, count0, count1, count2,
    pool_rows0, pool_rows1, pool_rows2,
    stride_y0, stride_y1, stride_y2, stride_b0, stride_b1, stride_b2,
    n_out0, n_out1, n_out2, down_bias, kinds, num_tokens, rank_cap,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, n] += sum over r of f(mid[site, :, t, r].sum()) * b[start + r, n], t = order[i].

    With ``down_bias`` and ``kinds`` f is the function of a bottleneck (``Backend.bottleneck_add``).
    A run outside the pool makes the tokens NaN.
    """
    tile = tl.program_id(0)
    site = tl.program_id(2)
    begin = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    n_out = pick(site, n_out0, n_out1, n_out2)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (begin >= end) | (tl.program_id(1) * BLOCK_N >= n_out):
        return
    slot = tl.load(tiles + 3 * tile)
    start, count, whole = run_of(
        slot,
        pick(site, start0, start1, start2),
        pick(site, count0, count1, count2),
        pick(site, pool_rows0, pool_rows1, pool_rows2),
        rank_cap,
    )
    if count == 0:
        return
    stride_b = pick(site, stride_b0, stride_b1, stride_b2).to(tl.int64)
    b = pick(site, b0, b1, b2) + start * stride_b
    inside = columns < n_out
    places = begin + tl.arange(0, BLOCK_T)
    real = places < end
    tokens = tl.load(order + places, mask=real, other=0).to(tl.int64)
    y = pick(site, y0, y1, y2)
    y_tile = (
        y
        + tokens[:, None] * pick(site, stride_y0, stride_y1, stride_y2).to(tl.int64)
        + columns[None, :]
    )
    shown = real[:, None] & inside[None, :]
    if not whole:
        tl.store(y_tile, tl.full((BLOCK_T, BLOCK_N), float("nan"), tl.float32), mask=shown)
        return
    sums = tl.load(y_tile, mask=shown, other=0.0).to(tl.float32)
    kind = 0
    if kinds is not None:
        kind = tl.load(kinds + slot)
    sums = with_ranks(
        sums, mid + (site * SPLIT_K * num_tokens + tokens)[:, None] * rank_cap,
        b + columns[None, :], down_bias, kind, start, count,
        real[:, None], inside[None, :], num_tokens * rank_cap, stride_b,
        BLOCK_T, BLOCK_R, SPLIT_K, PRECISION,
    )  # fmt: skip
    tl.store(y_tile, sums, mask=shown)
