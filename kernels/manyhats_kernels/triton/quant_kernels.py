"""Bodies of the 4-bit kernels; ``quant.py`` launches them, ``reference_4bit.py`` defines them.

A value is the product of its code and its run's scale in fp32, rounded once to the activations'
type, so that the weights that meet the tensor cores are bitsandbytes' own, bit for bit. (Launchers
switch off the fusing of products and sums, which would give double quantization's scales other
bits.) Codes come from a table of 16 values, one line of the first-level cache.

Sums are fp32. With several programs along K each keeps its part of the sum in ``parts``, and
``reduce_kernel`` adds these in order, so that no atomic makes a result depend on timing.

How many tokens and worn slots there are changes from step to step: no variant is compiled for some.
"""

import triton
import triton.language as tl


@triton.jit
def load_scales(
    index, mask, absmax, nested_code, nested_scale, nested_offset, NESTED: tl.constexpr
):
    """Scales of the runs in ``index``, fp32; NESTED is double quantization's run, 0 without it."""
    scales = tl.load(absmax + index, mask=mask, other=0)
    if NESTED > 0:
        inner = tl.load(nested_code + scales.to(tl.int32))
        outer = tl.load(nested_scale + index // NESTED, mask=mask, other=0.0)
        scales = inner * outer + tl.load(nested_offset)
    return scales


@triton.jit
def decode(packed, code):
    """The codes of packed pairs [..., J] as fp32 [..., 2 J]: the high nibble comes first."""
    pairs = packed.to(tl.int32)
    return tl.interleave(tl.load(code + (pairs >> 4)), tl.load(code + (pairs & 15)))


@triton.jit
def dequantize_kernel(
    out,
    packed,
    code,
    absmax,
    nested_code,
    nested_scale,
    nested_offset,
    num_values,
    RUN: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[e] = code[nibble(e)] * scale[e // RUN] for the BLOCK values of this program."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    half = first // 2 + tl.arange(0, BLOCK // 2)
    runs = first // RUN + tl.arange(0, BLOCK // RUN)
    scales = load_scales(
        runs, runs * RUN < num_values, absmax, nested_code, nested_scale, nested_offset, NESTED
    )
    values = decode(tl.load(packed + half, mask=2 * half < num_values, other=0), code)
    values = tl.reshape(values, (BLOCK // RUN, RUN)) * scales[:, None]
    places = first + tl.arange(0, BLOCK)
    tl.store(out + places, tl.reshape(values, (BLOCK,)), mask=places < num_values)


@triton.jit
def add_expand(
    sums,
    tokens,
    columns,
    num_tokens,
    n_out,
    shrunk,
    slots,
    segment_slots,
    segment_offsets,
    num_segments,
    start_of,
    count_of,
    b,
    pool_rows,
    stride_b,
    stride_shrunk,
    width,
    turn,
    turns,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[n, t] += sum over r of shrunk[:, t, r].sum() * b[start + r, n], of each token's slot.

    Takes every ``turns``-th segment from ``turn`` on and reads each one's rows once; what is not a
    segment's own token meets a zero. A run outside the pool, or wider than ``width``, makes its
    tokens NaN.
    """
    real = tokens < num_tokens
    worn = tl.load(slots + tokens, mask=real, other=-1)
    inside = columns < n_out
    for segment in range(turn, num_segments, turns):
        begin = tl.load(segment_offsets + segment)
        end = tl.load(segment_offsets + segment + 1)
        slot = tl.load(segment_slots + segment)
        own = real & (worn == slot)
        if (end > begin) & (tl.max(own.to(tl.int32), axis=0) > 0):
            start = tl.load(start_of + slot).to(tl.int64)
            count = tl.load(count_of + slot)
            whole = (count >= 0) & (count <= width)
            whole = whole & ((count == 0) | ((start >= 0) & (start + count <= pool_rows)))
            sums = tl.where(whole | (own[None, :] == 0), sums, float("nan"))
            count = tl.where(whole, count, 0)
            for first in range(0, count, BLOCK_R):
                ranks = first + tl.arange(0, BLOCK_R)
                mine = ranks < count
                rows = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
                for part in tl.static_range(PARTS):
                    rows += tl.load(
                        shrunk
                        + (part * num_tokens + tokens[None, :]).to(tl.int64) * stride_shrunk
                        + ranks[:, None],
                        mask=own[None, :] & mine[:, None],
                        other=0.0,
                    )
                b_part = tl.load(
                    b + (start + ranks[None, :]) * stride_b + columns[:, None],
                    mask=mine[None, :] & inside[:, None],
                    other=0.0,
                )
                sums = tl.dot(b_part.to(tl.float32), rows, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def matmul_kernel(
    out,
    parts,
    x,
    packed,
    code,
    absmax,
    nested_code,
    nested_scale,
    nested_offset,
    bias,
    num_tokens,
    n_out,
    n_in,
    stride_x,
    shrunk,
    slots,
    segment_slots,
    segment_offsets,
    num_segments,
    start_of,
    count_of,
    b,
    pool_rows,
    stride_b,
    stride_shrunk,
    width,
    RUN: tl.constexpr,
    NESTED: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPAND_PRECISION: tl.constexpr,
):
    """out[t, n] = sum over k of x[t, k] * W[n, k] (+ bias[n]) (+ the adapters' expand).

    BLOCK_K divides ``n_in``. With SPLIT the programs of the grid's third axis share K, and the
    segments of the adapters, and write to ``parts``, fp32 [programs, num_tokens, n_out].
    """
    part = tl.program_id(2)
    num_parts = tl.num_programs(2)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = columns < n_out
    real = tokens < num_tokens
    rows = columns.to(tl.int64) * n_in
    GROUP: tl.constexpr = RUN if RUN < BLOCK_K else BLOCK_K
    groups = tl.arange(0, BLOCK_K // GROUP) * GROUP
    bytes_of = packed + rows[:, None] // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    x_of = x + tokens[None, :].to(tl.int64) * stride_x + tl.arange(0, BLOCK_K)[:, None]
    steps = tl.cdiv(n_in // BLOCK_K, num_parts)
    k_end = tl.minimum((part + 1) * steps * BLOCK_K, n_in)
    sums = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for k in range(part * steps * BLOCK_K, k_end, BLOCK_K):
        scales = load_scales(
            (rows[:, None] + k + groups[None, :]) // RUN,
            inside[:, None],
            absmax,
            nested_code,
            nested_scale,
            nested_offset,
            NESTED,
        )
        w = decode(tl.load(bytes_of + k // 2, mask=inside[:, None], other=0), code)
        w = tl.reshape(w, (BLOCK_N, BLOCK_K // GROUP, GROUP)) * scales[:, :, None]
        w = tl.reshape(w, (BLOCK_N, BLOCK_K)).to(x.dtype.element_ty)
        x_part = tl.load(x_of + k, mask=real[None, :], other=0.0)
        sums = tl.dot(w, x_part, sums, input_precision=PRECISION)
    if PARTS > 0:
        # fmt: off
        sums = add_expand(
            sums, tokens, columns, num_tokens, n_out,
            shrunk, slots, segment_slots, segment_offsets, num_segments,
            start_of, count_of, b, pool_rows, stride_b, stride_shrunk, width,
            part, num_parts, PARTS, BLOCK_N, BLOCK_T, BLOCK_R, EXPAND_PRECISION,
        )
        # fmt: on
    places = tokens[None, :].to(tl.int64) * n_out + columns[:, None]
    shown = inside[:, None] & real[None, :]
    if SPLIT:
        tl.store(parts + part.to(tl.int64) * num_tokens * n_out + places, sums, mask=shown)
    else:
        if bias is not None:
            sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(out + places, sums, mask=shown)


@triton.jit(do_not_specialize=["num_tokens"])
def reduce_kernel(out, parts, bias, num_tokens, n_out, num_parts, BLOCK: tl.constexpr):
    """out[t, n] = parts[0, t, n] + parts[1, t, n] + ... (+ bias[n])."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_out
    place = tl.program_id(1).to(tl.int64) * n_out + columns
    size = num_tokens.to(tl.int64) * n_out
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(num_parts):
        sums += tl.load(parts + part * size + place, mask=inside, other=0.0)
    if bias is not None:
        sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def expand_kernel(
    out,
    num_tokens,
    n_out,
    shrunk,
    slots,
    segment_slots,
    segment_offsets,
    num_segments,
    start_of,
    count_of,
    b,
    pool_rows,
    stride_b,
    stride_shrunk,
    width,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[t, n] += the adapters' expand, for the products that another kernel made."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    places = out + tokens[None, :].to(tl.int64) * n_out + columns[:, None]
    shown = (columns < n_out)[:, None] & (tokens < num_tokens)[None, :]
    sums = add_expand(
        tl.load(places, mask=shown, other=0.0).to(tl.float32),
        tokens,
        columns,
        num_tokens,
        n_out,
        shrunk,
        slots,
        segment_slots,
        segment_offsets,
        num_segments,
        start_of,
        count_of,
        b,
        pool_rows,
        stride_b,
        stride_shrunk,
        width,
        0,
        1,
        PARTS,
        BLOCK_N,
        BLOCK_T,
        BLOCK_R,
        PRECISION,
    )
    tl.store(places, sums, mask=shown)
