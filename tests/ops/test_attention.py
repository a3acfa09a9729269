"""Paged attention of every backend against naive attention and PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from manyhats_kernels import AttentionBatch
from manyhats_kernels.testing import AttentionCase, assert_close, attention_case

MIXED = [(1, 17), (1, 1), (5, 5), (1, 300), (9, 40), (40, 40), (50, 71), (1, 16), (1, 32)]


def naive(case: AttentionCase, scale, window, cap) -> torch.Tensor:
    """Masked softmax attention, sequence by sequence, in double precision."""
    out = torch.empty(case.q.shape, dtype=torch.float64)
    for i, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        begin, end = case.batch.host_query_start[i : i + 2]
        group = case.q.shape[1] // keys.shape[1]
        k, v = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", case.q[begin:end].double(), k) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        position = torch.arange(len(keys) - (end - begin), len(keys))[:, None]
        seen = torch.arange(len(keys))[None, :]
        mask = seen <= position
        if window is not None:
            mask &= position - seen < window
        scores = scores.masked_fill(~mask, float("-inf"))
        out[begin:end] = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v)
    return out


def run(backend, case, scale, window=None, cap=None):
    return backend.paged_attention(
        case.q,
        case.k_cache,
        case.v_cache,
        case.batch,
        scale=scale,
        sliding_window=window,
        soft_cap=cap,
    )


@pytest.mark.parametrize(
    ("window", "cap"), [(None, None), (None, 2.5), (1, None), (7, 2.5), (33, None), (270, 2.5)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(2, 2, 16, 16), (6, 2, 24, 8)])
def test_ragged_batches(backend, dtype, heads, kv_heads, dim, size, window, cap):
    lengths = MIXED[:5] if backend.name == "reference" else MIXED  # token by token is slow
    case = attention_case(
        lengths, heads=heads, kv_heads=kv_heads, dim=dim, block_size=size, dtype=dtype
    )
    actual = run(backend, case, 0.3, window, cap)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_close(actual, naive(case, 0.3, window, cap))


@pytest.mark.parametrize(
    ("dim", "size"), [(8, 1), (64, 5), (80, 32), (128, 16), (256, 3), (320, 16)]
)
def test_head_sizes_and_block_sizes(backend, dtype, dim, size):
    case = attention_case(
        [(1, 37), (3, 9)], heads=3, kv_heads=1, dim=dim, block_size=size, dtype=dtype
    )
    assert_close(run(backend, case, dim**-0.5), naive(case, dim**-0.5, None, None))


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("window", [None, 100, 700])
def test_long_contexts(backend, dtype, window):
    """Contexts of several chunks, on and beside the chunks' edges."""
    lengths = [(1, 1500), (3, 257), (1, 256), (2, 513), (16, 520), (33, 600)]
    case = attention_case(lengths, heads=9, kv_heads=3, dim=64, block_size=16, dtype=dtype)
    assert_close(run(backend, case, 0.125, window), naive(case, 0.125, window, None))


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (45, None), (None, 2.5)])
@pytest.mark.parametrize(
    ("dim", "size"), [(8, 1), (24, 8), (64, 5), (80, 32), (128, 16), (256, 3), (320, 16)]
)
def test_long_prompts(backend, dtype, dim, size, window, cap):
    """More new tokens than are attended to in place: whole prompts, later pieces, last rows."""
    lengths = [(33, 33), (2, 9), (161, 161), (47, 300), (128, 140)]
    case = attention_case(lengths, heads=6, kv_heads=2, dim=dim, block_size=size, dtype=dtype)
    scale = 2 * dim**-0.5
    assert_close(run(backend, case, scale, window, cap), naive(case, scale, window, cap))


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (45, 2.5)])
def test_long_prompts_without_tiles(backend, monkeypatch, window, cap):
    """As on a machine that has no AMX: PyTorch attends to them."""
    monkeypatch.setattr(backend, "_amx", 0)
    lengths = [(33, 33), (2, 9), (47, 300)]
    case = attention_case(lengths, heads=6, kv_heads=2, dim=64, block_size=16, dtype=torch.bfloat16)
    assert_close(run(backend, case, 0.25, window, cap), naive(case, 0.25, window, cap))


def test_equals_pytorchs_own(backend):
    case = attention_case(
        [(1, 50), (12, 12), (4, 30)],
        heads=6,
        kv_heads=2,
        dim=32,
        block_size=16,
        dtype=torch.float32,
    )
    actual = run(backend, case, 32**-0.5)
    for i, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        begin, end = case.batch.host_query_start[i : i + 2]
        mask = torch.ones(end - begin, len(keys), dtype=torch.bool).tril(len(keys) - (end - begin))
        expected = scaled_dot_product_attention(
            case.q[begin:end].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )[0].transpose(0, 1)
        assert_close(actual[begin:end], expected)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 7), st.integers(0, 40)).map(lambda t: (t[0], t[0] + t[1])),
        min_size=1,
        max_size=4,
    ),
    size=st.sampled_from([1, 3, 16]),
    group=st.sampled_from([1, 3]),
    window=st.none() | st.integers(1, 50),
    cap=st.none() | st.floats(0.5, 30),
)
def test_drawn_batches(backend, lengths, size, group, window, cap):
    case = attention_case(
        lengths, heads=2 * group, kv_heads=2, dim=16, block_size=size, dtype=torch.float32
    )
    assert_close(run(backend, case, 0.4, window, cap), naive(case, 0.4, window, cap))


def test_large_scores_stay_right(backend):
    """Scores of some hundreds: softmax must subtract the maximum, over all chunks."""
    case = attention_case(
        [(1, 600), (2, 40)], heads=2, kv_heads=1, dim=64, block_size=16, dtype=torch.float32
    )
    assert_close(run(backend, case, 12.0), naive(case, 12.0, None, None), dtype=torch.float16)


@pytest.mark.parametrize("lengths", [[(1, 61)], [(6, 90)], [(40, 120), (1, 30)]], ids=str)
def test_blocks_behind_the_window_are_never_used(backend, dtype, lengths):
    """They may have been given to others: whatever is in them, NaN included, changes nothing."""
    case = attention_case(lengths, heads=3, kv_heads=1, dim=16, block_size=4, dtype=dtype)
    window = 13
    before = run(backend, case, 0.3, window)
    for i, (queries, context) in enumerate(lengths):
        gone = max(0, context - queries - window + 1) // 4
        blocks = case.batch.block_tables[i, :gone].long()
        case.k_cache[blocks], case.v_cache[blocks] = float("nan"), float("nan")
    assert torch.equal(run(backend, case, 0.3, window), before)


def test_no_sequences(backend):
    batch = AttentionBatch.build([], [], [], 16)
    cache = torch.zeros(backend.kv_cache_shape(2, 16, 1, 8))
    out = backend.paged_attention(
        torch.zeros(0, 2, 8), cache, cache, batch, scale=1.0, sliding_window=None, soft_cap=None
    )
    assert out.shape == (0, 2, 8)
    backend.store_kv(torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), cache, cache, batch)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused", "strided_last"])
def test_store_kv(backend, dtype, layout):
    batch = AttentionBatch.build([1, 4, 20], [17, 4, 23], [[5, 2], [0], [7, 1]], 16)
    tokens, kv_heads, dim = batch.num_tokens, 3, 20
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(tokens, kv_heads, dim, generator=random).to(dtype) for _ in range(2))
    caches = [
        torch.full(backend.kv_cache_shape(9, 16, kv_heads, dim), float("nan")).to(dtype)
        for _ in range(2)
    ]
    views = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "fused": lambda t: torch.cat([t * 2, t, t * 3], 1)[:, kv_heads : 2 * kv_heads],
        "strided_last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    }
    backend.store_kv(views[layout](k), views[layout](v), *caches, batch)
    for cache, rows in zip(caches, (k, v), strict=True):
        for token, place in enumerate(batch.slot_mapping.tolist()):
            own = cache[place // 16, :, place % 16]
            assert torch.equal(own, rows[token])
            own.fill_(float("nan"))
        assert cache.isnan().all(), "something else was written"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"v_cache": c.v_cache[..., :-1]}, "same head size"),
        (lambda c: {"q": c.q.half()}, "of the caches'"),
        (lambda c: {"q": c.q[1:]}, "q must be"),
        (lambda c: {"q": c.q[:, :3]}, "no multiple"),
        (lambda c: {"k_cache": c.k_cache[:2], "v_cache": c.v_cache[:2]}, "outside the cache"),
        (lambda c: {"sliding_window": 0}, "sliding_window"),
        (lambda c: {"soft_cap": 0.0}, "soft_cap"),
        (
            lambda c: {
                n: getattr(c, n).transpose(0, 1).contiguous().transpose(0, 1)
                for n in ("k_cache", "v_cache")
            },
            "contiguous",
        ),
    ],
    ids=["head_size", "dtype", "tokens", "heads", "blocks", "window", "cap", "layout"],
)
def test_arguments_that_do_not_fit_are_refused(backend, change, message):
    case = attention_case(
        [(2, 40), (1, 9)], heads=4, kv_heads=2, dim=16, block_size=16, dtype=torch.float32
    )
    arguments = {
        "q": case.q,
        "k_cache": case.k_cache,
        "v_cache": case.v_cache,
        "batch": case.batch,
        "scale": 1.0,
        "sliding_window": None,
        "soft_cap": None,
    }
    with pytest.raises(ValueError, match=message):
        backend.paged_attention(**(arguments | change(case)))


def test_keys_of_another_shape_are_refused(backend):
    batch = AttentionBatch.build([2], [2], [[0]], 4)
    cache = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="k and v must be"):
        backend.store_kv(torch.zeros(2, 1, 8), torch.zeros(2, 2, 8), cache, cache.clone(), batch)
    with pytest.raises(ValueError, match="of the caches'"):
        backend.store_kv(
            torch.zeros(2, 2, 8), torch.zeros(2, 2, 8).half(), cache, cache.clone(), batch
        )
