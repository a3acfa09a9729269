"""Bodies of the paged attention; ``attention.py`` launches them.

Softmax is made online (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135):
a program goes over its keys in tiles and keeps, of each query row, the largest score, the sum of
the exponentials and the weighted sum of the values, all fp32. Long contexts of single queries are
shared by several programs, whose three results the merge brings together (Flash-Decoding). Scores,
softmax and sums are fp32; the probabilities are rounded to the cache's type before they meet V.

The rows of a tile are queries times the query heads that share a kv head, so that each key and
value is read once for all of them.
"""

import triton
import triton.language as tl


@triton.jit
def soft_capped(scores, cap):
    """cap * tanh(scores / cap), from exp(-2|v|), which cannot overflow."""
    v = scores / cap
    small = tl.exp(-2.0 * tl.abs(v))
    size = (1.0 - small) / (1.0 + small)
    return cap * tl.where(v < 0, -size, size)


@triton.jit
def attend(
    q,
    positions,
    begin,
    end,
    table,
    k_cache,
    v_cache,
    stride_block,
    scale,
    cap,
    window,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the rows of ``q`` [BLOCK_M, HEAD] over the places begin:end of one sequence and kv head:
    the weighted sum of the values, the largest score and the sum of the exponentials.

    No place outside begin:end is read. A row that sees none has -inf as its largest score, sum 0.
    """
    columns = tl.arange(0, HEAD)
    inside = columns < DIM
    sums = tl.zeros((BLOCK_M, HEAD), dtype=tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(begin, end, BLOCK_KV):
        places = first + tl.arange(0, BLOCK_KV)
        real = places < end
        block = tl.load(table + places // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
        rows = block * stride_block + (places % BLOCK_SIZE) * DIM
        keys = tl.load(
            k_cache + rows[None, :] + columns[:, None],
            mask=real[None, :] & inside[:, None],
            other=0.0,
        )
        scores = tl.dot(q, keys, input_precision=PRECISION) * scale
        if CAPPED:
            scores = soft_capped(scores, cap)
        seen = real[None, :] & (places[None, :] <= positions[:, None])
        if WINDOWED:
            seen = seen & (positions[:, None] - places[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(peak - base)
        values = tl.load(
            v_cache + rows[:, None] + columns[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(weights, axis=1)
        sums = tl.dot(
            weights.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION
        )
        peak = higher
    return sums, peak, total


@triton.jit
def divided(sums, total):
    """sums / total, and 0 where a row saw nothing (the padding of a captured step)."""
    return tl.where(total > 0.0, sums / tl.where(total > 0.0, total, 1.0), 0.0)


@triton.jit
def visible_of(context, window, WINDOWED: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr):
    """The first place that a single new query sees, and the places that one program takes.

    A function of the sequence alone, so that its result has the same bits in any batch.
    """
    first = tl.maximum(context - window, 0) if WINDOWED else 0
    share = tl.cdiv(context - first, SPLITS)
    return first, tl.cdiv(tl.maximum(share, 1), CHUNK) * CHUNK


@triton.jit
def decode_kernel(
    out,
    parts,
    peaks,
    totals,
    q,
    k_cache,
    v_cache,
    query_start,
    context_lens,
    block_tables,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_block,
    stride_table,
    scale,
    cap,
    window,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One new query of a sequence: all query heads of a kv head over the program's own places.

    Grid: sequences, kv heads, programs that share a context. With DIRECT there is one of these and
    it writes ``out`` [T, heads, DIM]; otherwise ``parts`` [S, heads, programs, DIM] and ``peaks``,
    ``totals`` [S, heads, programs].
    """
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(query_start + sequence)
    context = tl.load(context_lens + sequence)
    first, share = visible_of(context, window, WINDOWED, SPLITS, CHUNK)
    begin = first + split * share
    single = tl.load(query_start + sequence + 1) - token == 1
    if not single or ((begin >= context) & (split > 0)):
        return
    members = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + members
    columns = tl.arange(0, HEAD)
    shown = (members < GROUP)[:, None] & (columns < DIM)[None, :]
    query = tl.load(
        q
        + token.to(tl.int64) * stride_qt
        + heads[:, None] * stride_qh
        + columns[None, :] * stride_qd,
        mask=shown,
        other=0.0,
    )
    sums, peak, total = attend(
        query,
        tl.zeros((BLOCK_M,), dtype=tl.int32) + (context - 1),
        begin,
        tl.minimum(begin + share, context),
        block_tables + sequence.to(tl.int64) * stride_table,
        k_cache + kv_head * BLOCK_SIZE * DIM,
        v_cache + kv_head * BLOCK_SIZE * DIM,
        stride_block,
        scale,
        cap,
        window,
        CAPPED,
        False,
        DIM,
        HEAD,
        BLOCK_SIZE,
        BLOCK_M,
        BLOCK_KV,
        PRECISION,
    )
    num_heads = tl.num_programs(1) * GROUP
    if DIRECT:
        # the token again: kept over the loop, it would be the register too many
        out += tl.load(query_start + sequence).to(tl.int64) * (num_heads * DIM)
        out += heads[:, None] * DIM + columns[None, :]
        tl.store(out, divided(sums, total[:, None]), mask=shown)
    else:
        place = (sequence.to(tl.int64) * num_heads + heads) * tl.num_programs(2) + split
        tl.store(parts + place[:, None] * DIM + columns[None, :], sums, mask=shown)
        tl.store(peaks + place, peak, mask=members < GROUP)
        tl.store(totals + place, total, mask=members < GROUP)


@triton.jit
def merge_kernel(
    out,
    parts,
    peaks,
    totals,
    query_start,
    context_lens,
    num_splits,
    window,
    WINDOWED: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One head of a single new query: the programs' parts, in order, as one softmax."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    context = tl.load(context_lens + sequence)
    first, share = visible_of(context, window, WINDOWED, SPLITS, CHUNK)
    columns = tl.arange(0, HEAD)
    inside = columns < DIM
    row = sequence.to(tl.int64) * tl.num_programs(1) + head
    sums = tl.zeros((HEAD,), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
    peak = tl.full((), float("-inf"), dtype=tl.float32)
    for split in range(tl.cdiv(context - first, share)):
        place = row * num_splits + split
        own = tl.load(peaks + place)
        higher = tl.maximum(peak, own)
        fade = tl.exp(peak - higher)
        weight = tl.exp(own - higher)
        part = tl.load(parts + place * DIM + columns, mask=inside, other=0.0)
        sums = sums * fade + part * weight
        total = total * fade + tl.load(totals + place) * weight
        peak = higher
    place = (token.to(tl.int64) * tl.num_programs(1) + head) * DIM + columns
    tl.store(out + place, divided(sums, total), mask=inside)


@triton.jit
def sequence_of(query_start, num_sequences, tile, TOKENS: tl.constexpr):
    """The sequence that a tile belongs to, when each sequence has one tile more than it may need.

    Sequence i's tiles begin at ``query_start[i] // TOKENS + i``.
    """
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def prefill_kernel(
    out,
    q,
    k_cache,
    v_cache,
    query_start,
    context_lens,
    block_tables,
    num_sequences,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_block,
    stride_table,
    scale,
    cap,
    window,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of a sequence's new queries, BLOCK_M // MEMBERS of them, for one kv head.

    Grid: tiles, kv heads. MEMBERS is GROUP, the query heads of a kv head, rounded up to a power of
    two. Sequences of one new query are ``decode_kernel``'s.
    """
    TOKENS: tl.constexpr = BLOCK_M // MEMBERS
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = sequence_of(query_start, num_sequences, tile, TOKENS)
    start = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - start
    first = (tile - start // TOKENS - sequence) * TOKENS
    if (queries == 1) | (first >= queries):
        return
    context = tl.load(context_lens + sequence)
    before = context - queries
    rows = tl.arange(0, BLOCK_M)
    tokens = first + rows // MEMBERS
    members = rows % MEMBERS
    heads = kv_head * GROUP + members
    columns = tl.arange(0, HEAD)
    shown = ((tokens < queries) & (members < GROUP))[:, None] & (columns < DIM)[None, :]
    query = tl.load(
        q
        + (start + tokens).to(tl.int64)[:, None] * stride_qt
        + heads[:, None] * stride_qh
        + columns[None, :] * stride_qd,
        mask=shown,
        other=0.0,
    )
    begin = tl.maximum(before + first - window + 1, 0) if WINDOWED else 0
    sums, _, total = attend(
        query,
        before + tokens,
        begin,
        tl.minimum(before + first + TOKENS, context),
        block_tables + sequence.to(tl.int64) * stride_table,
        k_cache + kv_head * BLOCK_SIZE * DIM,
        v_cache + kv_head * BLOCK_SIZE * DIM,
        stride_block,
        scale,
        cap,
        window,
        CAPPED,
        WINDOWED,
        DIM,
        HEAD,
        BLOCK_SIZE,
        BLOCK_M,
        BLOCK_KV,
        PRECISION,
    )
    num_heads = tl.num_programs(1) * GROUP
    places = ((start + tokens).to(tl.int64) * num_heads + heads)[:, None] * DIM + columns[None, :]
    tl.store(out + places, divided(sums, total[:, None]), mask=shown)
