"""4-bit products with the adapters' in the same pass, against the reference and against both apart.

In Triton's interpreter, or on a GPU where there is one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.device import DTYPES
from support.fourbit import quantized
from support.triton_backend import DEVICE, bits, triton_backend

from manyhats_kernels import StaticAdapterBatch, reference_4bit
from manyhats_kernels.groups import AdaptedFourBit, FusedFourBit, SiteGroup, SiteWeights
from manyhats_kernels.native.backend import NativeBackend
from manyhats_kernels.testing import WORKLOADS, Workload, assert_close, lora_case, windowed
from manyhats_kernels.triton import quant

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

OUTS = (70, 33, 24, 5)
"""Of four matrices that read one input: two launches of the shrink."""

RAGGED = Workload((-1, 0, 2, 1, 2, 4, -1), (3, 17, 40, 5, 6))
"""Base rows, a slot that nobody wears, the last slot, ranks under, at and over a step."""


def on_device(weight):
    moved = {n: getattr(weight, n).to(DEVICE) for n in ("packed", "code", "absmax")}
    return replace(weight, **moved)


def case_of(workload, dtype, *, n_in=96, outs=OUTS):
    """The group and x; the first matrix has a bias."""
    cases = [
        lora_case(workload, n_in, out, dtype, seed=i, device=DEVICE) for i, out in enumerate(outs)
    ]
    weights = tuple(on_device(quantized((out, n_in), dtype, seed=out)[0]) for out in outs)
    bias = torch.linspace(-1, 1, outs[0]).to(DEVICE, dtype)
    sites = SiteGroup([SiteWeights(case.a, case.b, case.rows) for case in cases])
    group = AdaptedFourBit(weights, (bias, *[None] * (len(outs) - 1)), sites)
    return group, cases[0].x, cases[0].batch


def check(group, x, batch, worn):
    actual = triton_backend().matmul_4bit_lora_group(x, group, worn, batch)
    expected = reference_4bit.matmul_4bit_lora_group(x, group, worn, batch)
    for y, right in zip(actual, expected, strict=True):
        assert y.is_contiguous()
        assert_close(y, right, scale=1.0)
    return actual


@pytest.fixture
def expands(monkeypatch):
    """Of each 4-bit product, whether the adapters' expand was its epilogue."""
    seen, sound = [], quant.fused

    def watched(x, weight, bias, expand, *rest):
        seen.append(expand is not None)
        return sound(x, weight, bias, expand, *rest)

    monkeypatch.setattr(quant, "fused", watched)
    return seen


def test_which_backends_are_of_this_kind():
    assert isinstance(triton_backend(), FusedFourBit)
    assert not issubclass(NativeBackend, FusedFourBit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group(dtype, expands):
    group, x, batch = case_of(RAGGED, dtype)
    check(group, x, batch, [True] * 4)
    assert expands == [True] * 4


def test_a_matrix_that_is_dequantized_first(expands):
    """Whose inputs are no multiple of 32."""
    group, x, batch = case_of(RAGGED, torch.float16, n_in=50, outs=(40,))
    check(group, x, batch, [True])
    assert expands == []


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload(name, expands):
    """Long segments are over the bound up to which the expand is an epilogue."""
    workload = WORKLOADS[name]()
    group, x, batch = case_of(workload, torch.float16, n_in=64, outs=(40,))
    check(group, x, batch, [True])
    assert expands == [len(batch.order) > 0 and len(workload.slots) <= quant.EXPAND_UP_TO]


def test_where_nobody_has_rows_nothing_is_read(expands):
    group, x, batch = case_of(RAGGED, torch.float32)
    for site in group.sites.sites[1:3]:
        site.a.fill_(float("nan"))
        site.b.fill_(float("nan"))
    check(group, x, batch, [True, False, False, True])
    assert expands == [True, False, False, True]


def test_no_token_is_changed_by_what_it_does_not_wear():
    group, x, batch = case_of(RAGGED, torch.float32)
    before = check(group, x, batch, [True] * 4)
    plain = [
        triton_backend().matmul_4bit(x, weight, bias)
        for weight, bias in zip(group.weights, group.biases, strict=True)
    ]
    for site in group.sites.sites:
        start, count = int(site.rows.start[2]), int(site.rows.count[2])
        site.a[start : start + count] *= -3
    after = check(group, x, batch, [True] * 4)
    own, base = batch.slots == 2, batch.slots == -1
    for y, other, bare in zip(before, after, plain, strict=True):
        assert torch.equal(bits(y[~own]), bits(other[~own]))
        assert not torch.equal(y[own], other[own])
        assert torch.equal(bits(y[base]), bits(bare[base]))
        assert not torch.equal(y[~base], bare[~base])


@pytest.mark.parametrize("name", ["empty_segment", "last_slot", "base_only"])
def test_a_static_plan_gives_the_bits_of_the_plan(name):
    """As a captured step is given it: more tokens than there are, those after them of the base."""
    workload = WORKLOADS[name]()
    group, x, batch = case_of(workload, torch.float32, n_in=64, outs=(70, 40))
    eager = check(group, x, batch, [True, True])
    tokens = len(workload.slots)
    plan = StaticAdapterBatch(-(-tokens // 16) * 16, batch.num_slots, DEVICE)
    plan.fill((0,) * tokens)
    plan.fill(workload.slots)
    wide = torch.zeros((plan.num_tokens, x.shape[1]), device=DEVICE)
    wide[:tokens] = x
    x = windowed(wide, x.dtype, DEVICE)
    for y, right in zip(
        triton_backend().matmul_4bit_lora_group(x, group, [True, True], plan), eager, strict=True
    ):
        assert torch.equal(bits(y[:tokens]), bits(right))


def test_a_run_that_does_not_fit_makes_its_own_tokens_nan():
    group, x, batch = case_of(RAGGED, torch.float32, outs=(70,))
    (good,) = check(group, x, batch, [True])
    group.sites.sites[0].rows.count[1] = 18
    (bad,) = triton_backend(max_rank=17).matmul_4bit_lora_group(x, group, [True], batch)
    own = (batch.slots == 1) | (batch.slots == 2)  # 18 and 40 rows
    assert bad[own].isnan().all()
    assert_close(bad[~own], good[~own])


def test_what_does_not_fit_is_refused():
    group, x, batch = case_of(RAGGED, torch.float32)
    run = triton_backend().matmul_4bit_lora_group
    for bad in (x[:-1], x[:, :-1], x.half()):
        with pytest.raises(ValueError, match="x must be"):
            run(bad, group, [True] * 4, batch)
    with pytest.raises(ValueError, match="worn has 3 entries for 4"):
        run(x, group, [True] * 3, batch)
    with pytest.raises(ValueError, match="rows cover 5 slots, the plan 9"):
        run(x, group, [True] * 4, StaticAdapterBatch(7, 9, DEVICE))
    with pytest.raises(ValueError, match=r"1 matrices, 4 biases and 4 sites"):
        replace(group, weights=group.weights[:1])
    with pytest.raises(ValueError, match=r"a matrix is \(5, 96\), its site \(70, 96\)"):
        replace(group, weights=group.weights[::-1])
