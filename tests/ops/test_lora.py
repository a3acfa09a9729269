"""lora_add and bias_add of every backend against fp32 arithmetic of the plainest kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats_kernels import AdapterBatch, SiteRows
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.testing import WORKLOADS, LoraCase, Workload, assert_close, lora_case

SHAPES = ((576, 320), (33, 300), (7, 17))


def in_fp64(case: LoraCase) -> torch.Tensor:
    """y + (x A^T) B in double precision, from the definition alone."""
    out = case.y.double().clone()
    for token, slot in enumerate(case.batch.slots.tolist()):
        if slot >= 0:
            start, count = int(case.rows.start[slot]), int(case.rows.count[slot])
            a, b = (pool[start : start + count].double() for pool in (case.a, case.b))
            out[token] += (a @ case.x[token].double()) @ b
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload(backend, dtype, name, shape):
    case = lora_case(WORKLOADS[name](), *shape, dtype)
    storage, y = case.fresh_y()
    backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    assert_close(y, in_fp64(case))
    idle = [t for t, s in enumerate(case.batch.slots.tolist()) if s < 0 or case.rows.count[s] == 0]
    assert torch.equal(bits(y[idle]), bits(case.y[idle])), "a token without rows changed"
    margin = slice(shape[1], None)
    assert torch.equal(bits(storage[:, margin]), bits(case.storage[:, margin]))


@pytest.mark.parametrize("name", ["distinct", "ranks_mixed", "long_segment"])
def test_accumulates_in_fp32_and_rounds_once(backend, name):
    """In 16 bits nearly every value equals the reference's: sums in 16 bits would not."""
    case = lora_case(WORKLOADS[name](), 576, 320, torch.bfloat16, seed=3)
    _, y = case.fresh_y()
    _, expected = case.fresh_y()
    backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    ReferenceBackend().lora_add(expected, case.x, case.a, case.b, case.rows, case.batch)
    assert (y != expected).float().mean() < 2e-3


@st.composite
def small_workloads(draw):
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    slots = draw(st.lists(st.integers(-1, len(counts) - 1), max_size=12))
    return Workload(tuple(slots), tuple(counts))


@settings(max_examples=40, deadline=None)
@given(workload=small_workloads(), n_in=st.integers(1, 70), n_out=st.integers(1, 70))
def test_drawn_workloads(backend, workload, n_in, n_out):
    for dtype in (torch.float32, torch.bfloat16):
        case = lora_case(workload, n_in, n_out, dtype)
        _, y = case.fresh_y()
        backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
        assert_close(y, in_fp64(case), scale=1.0)


@pytest.mark.parametrize("name", ["distinct", "ranks_mixed", "long_segment", "skewed"])
def test_another_adapters_weights_change_no_bit(backend, dtype, name):
    case = lora_case(WORKLOADS[name](), 96, 80, dtype)
    _, before = case.fresh_y()
    backend.lora_add(before, case.x, case.a, case.b, case.rows, case.batch)
    changed = case.batch.worn[-1]
    start, count = int(case.rows.start[changed]), int(case.rows.count[changed])
    case.a[start : start + count] *= -3
    case.b[start : start + count] += 2
    _, after = case.fresh_y()
    backend.lora_add(after, case.x, case.a, case.b, case.rows, case.batch)
    others = case.batch.slots != changed
    assert torch.equal(bits(before[others]), bits(after[others]))
    assert not torch.equal(before[~others], after[~others])


def test_strided_rows_and_views(backend, dtype):
    """x and y may be columns of something wider, as slices of a fused projection are."""
    case = lora_case(WORKLOADS["uniform"](), 64, 48, dtype)
    wide = torch.full((case.x.shape[0], 200), float("nan"), dtype=dtype)
    wide[:, 11:75] = case.x
    _, y = case.fresh_y()
    backend.lora_add(y, wide[:, 11:75], case.a, case.b, case.rows, case.batch)
    assert_close(y, in_fp64(case))


def test_rows_updated_in_place_are_seen(backend):
    case = lora_case(Workload((0, 0), (4, 4)), 32, 32, torch.float32)
    start, count = case.rows.start.clone(), case.rows.count.clone()
    case.rows.count[0] = 0
    _, y = case.fresh_y()
    backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    assert torch.equal(bits(y), bits(case.y))
    case.rows.start.copy_(start)
    case.rows.count.copy_(count)
    backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    assert_close(y, in_fp64(case))


def test_no_tokens(backend, dtype):
    case = lora_case(Workload((), (4,)), 32, 32, dtype)
    backend.lora_add(case.y, case.x, case.a, case.b, case.rows, case.batch)


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 99), (-1, 2), (2**30, 1), (0, -1)],
    ids=["long", "low", "far", "negative"],
)
def test_rows_outside_the_pool_are_refused_and_nothing_is_written(backend, start, count):
    case = lora_case(Workload((0, 1), (4, 4)), 32, 32, torch.float32)
    case.rows.start[1], case.rows.count[1] = start, count
    _, y = case.fresh_y()
    with pytest.raises(ValueError, match=f"slot 1 owns rows {start}:{start + count}, outside"):
        backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    assert torch.equal(bits(y[1]), bits(case.y[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"x": c.x.half()}, "one dtype"),
        (lambda c: {"x": c.x[:, :-1]}, "do not fit"),
        (lambda c: {"b": c.b[1:]}, "do not fit"),
        (lambda c: {"y": c.y[:, 1:]}, "do not fit"),
        (lambda c: {"x": c.x[0]}, "two-dimensional"),
        (lambda c: {"x": c.x[:-1], "y": c.y[:-1]}, "the plan has"),
        (lambda c: {"x": c.x.T.contiguous().T}, "contiguous"),
        (lambda c: {"rows": SiteRows(c.rows.start[:-1], c.rows.count[:-1])}, "rows cover"),
    ],
    ids=["dtype", "in", "rank", "out", "flat", "tokens", "stride", "slots"],
)
def test_arguments_that_do_not_fit_are_refused(backend, change, message):
    case = lora_case(WORKLOADS["uniform"](), 32, 24, torch.float32)
    arguments = {"y": case.y, "x": case.x, "a": case.a, "b": case.b, "rows": case.rows}
    with pytest.raises(ValueError, match=message):
        backend.lora_add(**(arguments | change(case)), batch=case.batch)


@pytest.mark.parametrize("slots", [(2, -1, 0, 2), (-1, -1), (1,) * 40], ids=str)
def test_bias_add(backend, dtype, slots):
    random = torch.Generator().manual_seed(1)
    bias = torch.randn(3, 37, generator=random).to(dtype)
    bias[[s for s in range(3) if s not in slots]] = float("nan")
    storage = torch.randn(len(slots), 40, generator=random).to(dtype)
    before, y = storage.clone(), storage[:, :37]
    backend.bias_add(y, bias, AdapterBatch.build(slots, 3))
    expected = before.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[token, :37] = (before[token, :37].float() + bias[slot].float()).to(dtype)
    assert torch.equal(bits(storage), bits(expected))


def test_bias_of_another_shape_is_refused(backend):
    batch = AdapterBatch.build([0, 1], 2)
    with pytest.raises(ValueError, match="do not fit"):
        backend.bias_add(torch.zeros(2, 4), torch.zeros(2, 5), batch)
    with pytest.raises(ValueError, match="2 slots"):
        backend.bias_add(torch.zeros(2, 4), torch.zeros(1, 4), batch)
    with pytest.raises(ValueError, match="dtype"):
        backend.bias_add(torch.zeros(2, 4), torch.zeros(2, 4).half(), batch)


@pytest.mark.parametrize(
    ("start", "count"),
    [
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(6, dtype=torch.int32)[::2], torch.zeros(3, dtype=torch.int32)),
    ],
    ids=["float", "unequal", "strided"],
)
def test_site_rows_are_checked(start, count):
    with pytest.raises(ValueError, match="must be"):
        SiteRows(start, count)
