"""A plan in static buffers computes what the plan computes, and keeps nothing of the one before."""

from __future__ import annotations

import pytest
import torch
from support.triton_backend import DEVICE, bits, triton_backend

from manyhats_kernels import AdapterBatch
from manyhats_kernels.static_batch import StaticAdapterBatch
from manyhats_kernels.testing import Workload, lora_case, windowed
from manyhats_kernels.triton.plan import DECODE_TOKENS, cut, most_tiles

LARGE = Workload((0, 3, 3, -1, 2, 3, 0) + (2,) * 18, (5, 0, 20, 3))
SMALL = Workload((3, -1, 1), (5, 0, 20, 3))


def padded(values: torch.Tensor, rows: int) -> torch.Tensor:
    """The values and, below them, rows of NaN up to ``rows``."""
    wide = torch.full((rows, values.shape[1]), float("nan"), device=DEVICE)
    wide[: values.shape[0]] = values
    return windowed(wide, values.dtype, DEVICE)


def tensors(plan: StaticAdapterBatch) -> list[list[int]]:
    table = plan.tiles.table
    parts = (plan.slots, plan.order, plan.segment_slots, plan.segment_offsets, table)
    return [part.tolist() for part in parts]


def check(plan: StaticAdapterBatch, workload: Workload) -> None:
    """The plan, loaded, in a batch padded to its size: bit by bit what eager computes."""
    case = lora_case(workload, 33, 40, torch.float32, device=DEVICE)
    backend = triton_backend()
    _, expected = case.fresh_y()
    backend.lora_add(expected, case.x, case.a, case.b, case.rows, case.batch)
    backend.bias_add(expected, torch.full((4, 40), 0.5, device=DEVICE), case.batch)
    y = padded(case.y, plan.num_tokens)
    x = padded(case.x, plan.num_tokens)
    before = y.clone()
    backend.lora_add(y, x, case.a, case.b, case.rows, plan)
    backend.bias_add(y, torch.full((4, 40), 0.5, device=DEVICE), plan)
    real = len(workload.slots)
    assert torch.equal(bits(y[:real]), bits(expected))
    assert torch.equal(bits(y[real:]), bits(before[real:])), "a padding row was written"


def test_plans_one_after_the_other_in_one_buffer():
    plan = StaticAdapterBatch(30, 4, DEVICE)
    addresses = [t.data_ptr() for t in (plan.slots, plan.order, plan.tiles.table)]
    for workload in (LARGE, SMALL, LARGE):
        plan.fill(workload.slots)
        check(plan, workload)
    assert addresses == [t.data_ptr() for t in (plan.slots, plan.order, plan.tiles.table)]


def test_a_smaller_plan_leaves_nothing_of_the_former_one():
    used, fresh = (StaticAdapterBatch(30, 4, DEVICE) for _ in range(2))
    used.fill(LARGE.slots)
    used.load(AdapterBatch.build(SMALL.slots, 4))
    fresh.fill(SMALL.slots)
    assert tensors(used) == tensors(fresh)
    used.fill([])
    assert tensors(used) == tensors(StaticAdapterBatch(30, 4, DEVICE))


def test_padding_is_tokens_of_the_base_empty_segments_and_tiles_of_nothing():
    plan = StaticAdapterBatch(5, 3, DEVICE)
    plan.fill([2, -1, 0, 2])
    assert tensors(plan) == [
        [2, -1, 0, 2, -1],
        [2, 0, 3, 0, 0],
        [0, 2, 0],
        [0, 1, 3, 3],
        [[0, 0, 1], [2, 1, 3], [0, 0, 0]],
    ]


@pytest.mark.parametrize("num_slots", [0, 1, 3, 50])
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_the_worst_plan_fits_exactly(tokens, num_slots):
    """As many segments as can be, the rest of the tokens in one of them."""
    segments = min(tokens, num_slots)
    slots = list(range(segments)) + [0] * (tokens - segments) if segments else [-1] * tokens
    tiles = cut(AdapterBatch.build(slots, num_slots).segments, DECODE_TOKENS)
    assert len(tiles) == most_tiles(tokens, num_slots, DECODE_TOKENS)
    StaticAdapterBatch(tokens, num_slots, DEVICE).fill(slots)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    plan = StaticAdapterBatch(3, 4, DEVICE)
    plan.fill([1, 3])
    before = tensors(plan)
    with pytest.raises(ValueError, match="num_tokens 4 is over the 3 planned"):
        plan.fill([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"slots\[1\] = 4"):
        plan.fill([0, 4])
    with pytest.raises(ValueError, match="num_slots 5 is over the 4 planned"):
        plan.load(AdapterBatch.build([0], 5))
    with pytest.raises(ValueError, match="must lie on the CPU, not on meta"):
        plan.load(AdapterBatch.build([0], 4, "meta"))
    assert tensors(plan) == before
    with pytest.raises(ValueError, match="num_tokens must be >= 1"):
        StaticAdapterBatch(0, 4, DEVICE)
