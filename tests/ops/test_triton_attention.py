"""The Triton paged attention against the reference: in the interpreter, or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device import DEVICE, DTYPES, on_device

from manyhats_kernels import AttentionBatch
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.testing import assert_close, attention_case
from manyhats_kernels.triton import attention
from manyhats_kernels.triton.attention import TritonAttention

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

TRITON = TritonAttention()
MIXED = [(1, 17), (1, 1), (5, 5), (9, 40), (37, 37), (1, 33)]


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


def run(case, scale=0.3, window=None, cap=None, backend=TRITON):
    batch = case.batch if backend is not TRITON else on_device(case.batch)
    tensors = [case.q, case.k_cache, case.v_cache]
    if backend is TRITON and DEVICE.type == "cuda":
        # a copy keeps q's order of memory: transposed, as a model's reshape leaves it
        tensors = [t.to(DEVICE) for t in tensors]
    return backend.paged_attention(
        *tensors, batch, scale=scale, sliding_window=window, soft_cap=cap
    ).cpu()


def in_fp32(case, **options):
    """The reference on the same values, its own result not rounded."""
    wide = dataclasses.replace(
        case, q=case.q.float(), k_cache=case.k_cache.float(), v_cache=case.v_cache.float()
    )
    return run(wide, backend=ReferenceBackend(), **options)


@pytest.mark.parametrize(
    ("window", "cap", "heads", "kv_heads", "dim", "size"),
    [
        (None, None, 2, 2, 16, 16),
        (1, None, 6, 2, 24, 8),
        (7, 2.5, 6, 2, 24, 8),
        (33, None, 2, 2, 16, 16),
    ],
)
def test_mixed_batches(dtype, heads, kv_heads, dim, size, window, cap):
    case = attention_case(
        MIXED, heads=heads, kv_heads=kv_heads, dim=dim, block_size=size, dtype=dtype
    )
    actual = run(case, window=window, cap=cap)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_close(actual, in_fp32(case, window=window, cap=cap))


@pytest.mark.parametrize(
    ("dim", "size", "heads", "kv_heads"),
    [(8, 1, 3, 1), (64, 5, 7, 1), (80, 32, 2, 2), (128, 16, 20, 1), (256, 3, 4, 2)],
)
def test_head_sizes_block_sizes_and_groups(dtype, dim, size, heads, kv_heads):
    """20 heads of one kv head are more than the 16 rows of the smallest tile."""
    case = attention_case(
        [(1, 37), (3, 9)], heads=heads, kv_heads=kv_heads, dim=dim, block_size=size, dtype=dtype
    )
    assert_close(run(case, dim**-0.5), in_fp32(case, scale=dim**-0.5))


@pytest.mark.parametrize("window", [None, 300, 700])
def test_contexts_that_programs_share(dtype, window):
    """On and beside the edges of a program's share, mixed with a prompt's chunk and a short one."""
    lengths = [(1, 256), (1, 257), (3, 290), (1, 5), (1, 530)]
    case = attention_case(lengths, heads=2, kv_heads=1, dim=16, block_size=16, dtype=dtype)
    assert_close(run(case, window=window), in_fp32(case, window=window))


def test_a_context_over_all_shares(monkeypatch):
    """Over SPLITS * CHUNK places the shares grow; here they do so early."""
    monkeypatch.setattr(attention, "SPLITS", 2)
    lengths = [(1, 1100), (1, 513), (1, 512)]
    case = attention_case(lengths, heads=2, kv_heads=1, dim=16, block_size=16, dtype=torch.float32)
    assert_close(run(case), in_fp32(case))


def test_large_scores_stay_right():
    """Scores of some hundreds: softmax must subtract the maximum, over all shares too."""
    case = attention_case(
        [(1, 600), (2, 40)], heads=2, kv_heads=1, dim=64, block_size=16, dtype=torch.float32
    )
    assert_close(run(case, 12.0), in_fp32(case, scale=12.0), dtype=torch.float16)
    capped = in_fp32(case, scale=12.0, cap=50.0)
    assert_close(run(case, 12.0, None, 50.0), capped, dtype=torch.float16)


@settings(max_examples=12, deadline=None)
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
def test_drawn_batches(lengths, size, group, window, cap):
    case = attention_case(
        lengths, heads=2 * group, kv_heads=2, dim=16, block_size=size, dtype=torch.float32
    )
    assert_close(run(case, window=window, cap=cap), in_fp32(case, window=window, cap=cap))


@pytest.mark.parametrize("lengths", [[(1, 61)], [(6, 90)], [(40, 120), (1, 30)]], ids=str)
def test_blocks_behind_the_window_are_never_used(lengths):
    """They may have been given to others: whatever is in them, NaN included, changes nothing."""
    case = attention_case(lengths, heads=3, kv_heads=1, dim=16, block_size=4, dtype=torch.float16)
    before = run(case, window=13)
    for i, (queries, context) in enumerate(lengths):
        gone = max(0, context - queries - 13 + 1) // 4
        blocks = case.batch.block_tables[i, :gone].long()
        case.k_cache[blocks], case.v_cache[blocks] = float("nan"), float("nan")
    assert torch.equal(run(case, window=13), before)


def test_a_sequence_has_the_same_bits_in_any_batch():
    lengths = [(1, 40), (1, 300), (3, 9), (1, 700)]
    whole = attention_case(lengths, heads=2, kv_heads=1, dim=16, block_size=16, dtype=torch.float16)
    together = run(whole)
    for i, one in enumerate(lengths):
        begin, end = whole.batch.host_query_start[i : i + 2]
        alone = dataclasses.replace(
            whole,
            q=whole.q[begin:end],
            batch=AttentionBatch.build(
                [one[0]], [one[1]], [whole.batch.block_tables[i].tolist()], 16
            ),
        )
        assert torch.equal(run(alone), together[begin:end])


def test_padding_of_a_captured_step():
    """Sequences of context 0 give zeros, and a place of -1 is not stored."""
    case = attention_case(
        [(1, 300), (1, 9)], heads=2, kv_heads=1, dim=16, block_size=16, dtype=torch.float32
    )
    plan = case.batch
    padded = dataclasses.replace(
        plan,
        num_tokens=4,
        num_sequences=4,
        query_start=torch.arange(5, dtype=torch.int32),
        context_lens=torch.cat([plan.context_lens, torch.zeros(2, dtype=torch.int32)]),
        block_tables=torch.nn.functional.pad(plan.block_tables, (0, 0, 0, 2), value=-1),
        slot_mapping=torch.tensor([*plan.slot_mapping.tolist(), -1, -1]),
    )
    q = torch.cat([case.q, torch.ones(2, 2, 16)])
    actual = run(dataclasses.replace(case, q=q, batch=padded))
    assert torch.equal(actual[:2], run(case))
    assert not actual[2:].any()
    caches = [on_device(torch.full((40, 1, 16, 16), 7.0)) for _ in range(2)]
    k = on_device(torch.randn(4, 1, 16))
    TRITON.store_kv(k, k, *caches, on_device(padded))
    assert (caches[0] != 7).any(-1).sum() == 2


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused", "strided_last"])
def test_store_kv(dtype, layout):
    batch = AttentionBatch.build([1, 4, 20], [17, 4, 23], [[5, 2], [0], [7, 1]], 16)
    tokens, kv_heads, dim = batch.num_tokens, 3, 20
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(tokens, kv_heads, dim, generator=random).to(dtype) for _ in range(2))
    shape = TRITON.kv_cache_shape(9, 16, kv_heads, dim)
    caches = [on_device(torch.full(shape, float("nan")).to(dtype)) for _ in range(2)]
    views = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "fused": lambda t: torch.cat([t * 2, t, t * 3], 1)[:, kv_heads : 2 * kv_heads],
        "strided_last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    }
    given_views = (views[layout](on_device(t)) for t in (k, v))
    TRITON.store_kv(*given_views, *caches, on_device(batch))
    for cache, rows in zip(caches, (k, v), strict=True):
        held = cache.cpu()
        for token, place in enumerate(batch.slot_mapping.tolist()):
            own = held[place // 16, :, place % 16]
            assert torch.equal(own, rows[token])
            own.fill_(float("nan"))
        assert held.isnan().all(), "something else was written"


def test_a_token_wider_than_one_program():
    batch = AttentionBatch.build([2], [2], [[0]], 4)
    cache = on_device(torch.zeros(TRITON.kv_cache_shape(1, 4, 9, 128)))
    k = on_device(torch.randn(2, 9, 128))
    TRITON.store_kv(k, k, cache, cache.clone(), on_device(batch))
    assert torch.equal(cache[0, :, :2].transpose(0, 1), k)


def test_no_sequences():
    batch = on_device(AttentionBatch.build([], [], [], 16))
    cache = on_device(torch.zeros(TRITON.kv_cache_shape(2, 16, 1, 8)))
    none = on_device(torch.zeros(0, 2, 8))
    out = TRITON.paged_attention(
        none, cache, cache, batch, scale=1.0, sliding_window=None, soft_cap=None
    )
    assert out.shape == (0, 2, 8)
    TRITON.store_kv(none[:, :1], none[:, :1], cache, cache, batch)


def test_what_does_not_fit_is_refused():
    case = attention_case(
        [(2, 5)], heads=1, kv_heads=1, dim=257, block_size=16, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="head_dim 257 is over 256"):
        run(case)
    case = attention_case([(2, 5)], heads=2, kv_heads=2, dim=8, block_size=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="sliding_window"):
        run(case, window=0)
    with pytest.raises(ValueError, match="k and v must be"):
        TRITON.store_kv(case.q, case.q[:, :1], case.k_cache, case.v_cache, case.batch)


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 9, 3), (128, 32, 8), (256, 8, 1)])
def test_the_shapes_of_real_models(dim, heads, kv_heads):
    lengths = [(1, 4096), (1, 200), (512, 700), (300, 300), (1, 3)]
    case = attention_case(
        lengths, heads=heads, kv_heads=kv_heads, dim=dim, block_size=16, dtype=torch.bfloat16
    )
    from manyhats_kernels.cpu import TorchBackend

    wide = dataclasses.replace(
        case, q=case.q.float(), k_cache=case.k_cache.float(), v_cache=case.v_cache.float()
    )
    for window, cap in ((None, None), (1024, None), (None, 50.0)):
        expected = run(wide, dim**-0.5, window, cap, backend=TorchBackend())
        assert_close(run(case, dim**-0.5, window, cap), expected)
