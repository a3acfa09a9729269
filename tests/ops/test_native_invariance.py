"""What the native backend promises beyond the others: who shares the batch changes no bit."""

from __future__ import annotations

import pytest
import torch

from manyhats_kernels import AdapterBatch, AttentionBatch
from manyhats_kernels.testing import WORKLOADS, attention_case, lora_case


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("name", ["distinct", "ranks_mixed", "long_segment", "identical"])
def test_a_token_alone_has_the_same_bits(backend, dtype, name):
    case = lora_case(WORKLOADS[name](), 100, 333, dtype)
    _, together = case.fresh_y()
    backend.lora_add(together, case.x, case.a, case.b, case.rows, case.batch)
    for token in range(0, case.batch.num_tokens, 5):
        own = case.batch.slots[token : token + 1].tolist()
        alone = case.fresh_y()[1][token : token + 1]
        plan = AdapterBatch.build(own, case.batch.num_slots)
        backend.lora_add(alone, case.x[token : token + 1], case.a, case.b, case.rows, plan)
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_a_sequence_alone_has_the_same_bits(backend, dtype):
    lengths = [(1, 600), (5, 40), (1, 1), (20, 300)]
    case = attention_case(lengths, heads=6, kv_heads=2, dim=64, block_size=16, dtype=dtype)
    options = {"scale": 0.125, "sliding_window": None, "soft_cap": None}
    together = backend.paged_attention(case.q, case.k_cache, case.v_cache, case.batch, **options)
    for sequence, (queries, context) in enumerate(lengths):
        begin = case.batch.host_query_start[sequence]
        table = [b for b in case.batch.block_tables[sequence].tolist() if b >= 0]
        # the last token alone: a decode step where the whole was a piece of a prompt
        plan = AttentionBatch.build([1], [context], [table], 16)
        last = begin + queries - 1
        alone = backend.paged_attention(
            case.q[last : last + 1], case.k_cache, case.v_cache, plan, **options
        )
        assert torch.equal(alone[0], together[last])


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("window", [None, 70])
def test_a_prompt_in_pieces_has_the_same_bits(backend, window):
    """On AMX tiles: neither the pieces of a prompt nor its company changes a row."""
    if not backend.stacks_prompts:
        pytest.skip("this machine has no AMX")
    lengths = [(50, 80), (300, 310), (1, 7)]
    case = attention_case(lengths, heads=6, kv_heads=2, dim=64, block_size=16, dtype=torch.bfloat16)
    options = {"scale": 0.125, "sliding_window": window, "soft_cap": None}
    together = backend.paged_attention(case.q, case.k_cache, case.v_cache, case.batch, **options)
    table = [b for b in case.batch.block_tables[1].tolist() if b >= 0]
    first = case.batch.host_query_start[1]
    for begin, end in ((0, 35), (35, 200), (200, 300)):
        plan = AttentionBatch.build([end - begin], [10 + end], [table], 16)
        own = slice(first + begin, first + end)
        piece = backend.paged_attention(case.q[own], case.k_cache, case.v_cache, plan, **options)
        assert torch.equal(piece, together[own])
