"""The Triton backend's bottleneck_add, scale_rows and norm_rows against the reference.

In the interpreter on machines without a GPU, in fp16 and fp32; see test_triton_lora.py.
"""

from __future__ import annotations

import pytest
import torch
from support.triton_backend import DEVICE, bits, triton_backend

from manyhats_kernels import ACTIVATIONS, GATED, AdapterBatch
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.static_batch import StaticAdapterBatch
from manyhats_kernels.testing import (
    WORKLOADS,
    LoraCase,
    Workload,
    assert_close,
    lora_case,
    windowed,
)

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

DTYPES = (torch.float16, torch.float32)
EVERY_KIND = [*range(len(ACTIVATIONS)), *(GATED + i for i in range(len(ACTIVATIONS)))]
EVERY = Workload(
    (*(slot for slot in range(14) for _ in range(1 + slot % 2)), -1),
    tuple(15 + slot // 3 for slot in range(14)),
)
"""A slot for every kind; their last rows stand before, at and behind the edge of a block of 16."""


def bottleneck(
    backend, case: LoraCase, kinds: torch.Tensor, bias: torch.Tensor, batch=None
) -> torch.Tensor:
    _, y = case.fresh_y()
    backend.bottleneck_add(y, case.x, case.a, case.b, bias, kinds, case.rows, batch or case.batch)
    return y


def bottleneck_case(workload: Workload, dtype: torch.dtype, kinds: list[int]):
    """The case, its kinds, and a bias that is NaN where no worn slot owns a row."""
    case = lora_case(workload, 33, 70, dtype, device=DEVICE)
    bias = torch.randn(case.a.shape[0], generator=torch.Generator().manual_seed(5)).to(DEVICE)
    bias[case.a[:, 0].isnan()] = float("nan")
    return case, torch.tensor(kinds, dtype=torch.int32, device=DEVICE), bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_bottleneck_in_one_batch(dtype):
    arguments = bottleneck_case(EVERY, dtype, EVERY_KIND)
    y, expected = (bottleneck(b, *arguments) for b in (triton_backend(), ReferenceBackend()))
    for slot in range(14):  # by itself, or a large one would hide a small one
        own = arguments[0].batch.slots == slot
        assert_close(y[own], expected[own])
    assert torch.equal(bits(y[-1]), bits(arguments[0].y[-1])), "a token of the base changed"


@pytest.mark.parametrize("name", ["empty_segment", "long_segment", "ranks_mixed", "rank_1"])
def test_workloads(name):
    workload = WORKLOADS[name]()
    kinds = [EVERY_KIND[s * 5 % 14] for s in range(len(workload.counts))]
    arguments = bottleneck_case(workload, torch.float32, kinds)
    y = bottleneck(triton_backend(), *arguments)
    assert_close(y, bottleneck(ReferenceBackend(), *arguments))
    idle = [t for t, s in enumerate(workload.slots) if s < 0 or not workload.counts[s]]
    assert torch.equal(bits(y[idle]), bits(arguments[0].y[idle])), "an idle token changed"


def test_large_values_do_not_overflow():
    arguments = bottleneck_case(EVERY, torch.float32, EVERY_KIND)
    arguments[0].a.mul_(200.0)
    y = bottleneck(triton_backend(), *arguments)
    assert_close(y, bottleneck(ReferenceBackend(), *arguments))


def test_a_bottleneck_of_too_many_rows_makes_its_tokens_nan():
    arguments = bottleneck_case(Workload((0, 1), (4, 6)), torch.float32, [0, 0])
    y = bottleneck(triton_backend(max_width=5), *arguments)
    assert y[1].isnan().all()
    assert_close(y[0], bottleneck(ReferenceBackend(), *arguments)[0])


def row_case(workload: Workload, width: int, dtype: torch.dtype):
    """x, y, a row for each slot (NaN for those that nobody wears) and the plan."""
    random = torch.Generator().manual_seed(2)
    x, y = (torch.randn(len(workload.slots), width, generator=random) * 3 + 1 for _ in range(2))
    own = torch.randn(len(workload.counts), width, generator=random)
    own[[s for s in range(len(workload.counts)) if s not in workload.slots]] = float("nan")
    batch = AdapterBatch.build(workload.slots, len(workload.counts), DEVICE)
    return *(windowed(t, dtype, DEVICE) for t in (x, y, own)), batch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 1030])
@pytest.mark.parametrize("name", ["last_slot", "base_only", "skewed"])
def test_scale_rows(name, width, dtype):
    _, y, scale, batch = row_case(WORKLOADS[name](), width, dtype)
    expected = y.clone()
    triton_backend().scale_rows(y, scale, batch)
    ReferenceBackend().scale_rows(expected, scale, batch)
    assert torch.equal(bits(y), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 1030])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_norm_rows(dtype, width, centered, shifted):
    x, y, gain, batch = row_case(WORKLOADS["one_base_among_many"](), width, dtype)
    has = torch.tensor([1, 0, 1, 1], dtype=torch.int32, device=DEVICE)
    gain[1] = float("nan")
    shift = x[0].clone() if shifted else None
    before, expected = y.clone(), y.clone()
    options = {"eps": 1e-5, "centered": centered}
    triton_backend().norm_rows(y, x, gain, has, shift, batch, **options)
    ReferenceBackend().norm_rows(expected, x, gain, has, shift, batch, **options)
    assert_close(y, expected)
    others = (batch.slots == -1) | (batch.slots == 1)
    assert torch.equal(bits(y[others]), bits(before[others])), "a token without a gain changed"


def test_a_static_plan_does_the_same():
    arguments = bottleneck_case(Workload((0, 1, -1, 1), (5, 20)), torch.float32, [2, GATED])
    case = arguments[0]
    plan = StaticAdapterBatch(4, 2, DEVICE)
    plan.fill([0, 1, -1, 1])
    backend = triton_backend()
    y, expected = (bottleneck(backend, *arguments, batch=b) for b in (plan, case.batch))
    own = torch.randn(2, 70, device=DEVICE)
    has = torch.ones(2, dtype=torch.int32, device=DEVICE)
    for result, batch in ((y, plan), (expected, case.batch)):
        backend.scale_rows(result, own, batch)
        backend.norm_rows(result, result, own, has, None, batch, eps=1e-6, centered=True)
    assert torch.equal(bits(y), bits(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": torch.zeros(3)}, "kinds must be int32"),
        ({"kinds": torch.zeros(2, dtype=torch.int32)}, "kinds must be int32 for 3 slots"),
        ({"bias": torch.zeros(3)}, "down_bias must be float32"),
        ({"bias": None}, "contiguous"),
    ],
    ids=["type", "slots", "rows", "stride"],
)
def test_a_bottleneck_that_does_not_fit_is_refused(change, message):
    case, kinds, bias = bottleneck_case(Workload((0, 1, 2), (4, 4, 4)), torch.float32, [1, 1, 1])
    strided = torch.stack((bias, bias), 1)[:, 0]
    arguments = {"kinds": kinds, "bias": bias}
    arguments |= {k: strided if v is None else v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        bottleneck(triton_backend(), case, **arguments)


def test_rows_that_do_not_fit_are_refused():
    x, y, own, batch = row_case(Workload((0, 1), (1, 1)), 8, torch.float32)
    has = torch.ones(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        triton_backend().scale_rows(y, own.T.contiguous().T, batch)
    with pytest.raises(ValueError, match="has must be int32"):
        triton_backend().norm_rows(y, x, own, has[:1], None, batch, eps=1e-6, centered=True)
