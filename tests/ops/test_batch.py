"""The plans: what they hold, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhats_kernels import AdapterBatch, AttentionBatch


@given(slots=st.lists(st.integers(-1, 6), max_size=40), as_array=st.booleans())
def test_adapter_batch_groups_every_token_once(slots, as_array):
    batch = AdapterBatch.build(np.array(slots, dtype=np.int64) if as_array else slots, 7)
    assert batch.num_tokens == len(slots)
    assert batch.slots.tolist() == slots
    assert batch.worn == tuple(sorted(set(slots) - {-1})) == tuple(batch.segment_slots.tolist())
    order, offsets = batch.order.tolist(), batch.segment_offsets.tolist()
    grouped = [(s, order[b:e]) for s, b, e in zip(batch.worn, offsets, offsets[1:], strict=False)]
    assert grouped == [(w, [t for t, s in enumerate(slots) if s == w]) for w in batch.worn]
    assert batch.segments == tuple(zip(batch.worn, offsets, offsets[1:], strict=False))
    assert batch.longest == max((len(tokens) for _, tokens in grouped), default=0)
    tensors = (batch.slots, batch.order, batch.segment_slots, batch.segment_offsets)
    assert all(t.dtype == torch.int32 for t in tensors)


@pytest.mark.parametrize(
    ("slots", "num_slots", "message"),
    [
        ([0, 3], 3, r"slots\[1\] = 3 is outside \[-1, 3\)"),
        ([-2], 3, r"slots\[0\] = -2 is outside"),
        ([0], 0, r"outside \[-1, 0\)"),
        ([0.5], 3, "integers"),
        (np.zeros((2, 2), np.int32), 3, "one-dimensional"),
        ([], -1, "num_slots"),
    ],
)
def test_adapter_batch_refuses(slots, num_slots, message):
    with pytest.raises(ValueError, match=message):
        AdapterBatch.build(slots, num_slots)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), max_size=5),
    block_size=st.integers(1, 17),
    spare=st.integers(0, 2),
    data=st.data(),
)
def test_attention_batch_maps_every_new_token(lengths, block_size, spare, data):
    query = [n for n, _ in lengths]
    context = [n + c for n, c in lengths]
    needed = [-(-c // block_size) + spare for c in context]
    ids = data.draw(st.permutations(range(sum(needed) + 2)))
    tables = [ids[sum(needed[:i]) : sum(needed[: i + 1])] for i in range(len(needed))]
    batch = AttentionBatch.build(query, context, tables, block_size)
    expected = [
        table[p // block_size] * block_size + p % block_size
        for n, c, table in zip(query, context, tables, strict=True)
        for p in range(c - n, c)
    ]
    assert batch.slot_mapping.tolist() == expected
    assert batch.slot_mapping.dtype == torch.int64
    assert batch.query_start.tolist() == [sum(query[:i]) for i in range(len(query) + 1)]
    assert batch.host_query_start == tuple(batch.query_start.tolist())
    assert batch.context_lens.tolist() == context == list(batch.host_context_lens)
    assert (batch.num_tokens, batch.num_sequences) == (sum(query), len(query))
    for row, table in zip(batch.block_tables.tolist(), tables, strict=True):
        assert row == [*table, *[-1] * (len(row) - len(table))]
    used = [b for t, c in zip(tables, context, strict=True) for b in t[: -(-c // block_size)]]
    assert batch.max_block == max(used, default=-1)
    assert batch.max_query_len == max(query, default=0)
    assert batch.max_context_len == max(context, default=0)


@pytest.mark.parametrize(
    ("query", "context", "tables", "size", "message"),
    [
        ([1], [1, 2], [[0]], 16, "number of sequences, got 1, 2 and 1"),
        ([1, 0], [1, 2], [[0], [1]], 16, "query_lens must be >= 1: sequence 1"),
        ([3], [2], [[0]], 16, "context_lens must be >= query_lens"),
        ([1], [17], [[0]], 16, "must cover context_lens: sequence 0"),
        ([1], [17], [[0, -1]], 16, r"block_tables\[0\] has a negative"),
        ([1], [1], [[0]], 0, "block_size"),
        ([1.5], [2], [[0]], 16, "integers"),
    ],
)
def test_attention_batch_refuses(query, context, tables, size, message):
    with pytest.raises(ValueError, match=message):
        AttentionBatch.build(query, context, tables, size)
