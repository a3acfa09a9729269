"""scale_rows, norm_rows and bottleneck_add of every backend against the plainest arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from manyhats_kernels import AdapterBatch
from manyhats_kernels.backend import ACTIVATIONS, GATED
from manyhats_kernels.testing import WORKLOADS, LoraCase, Workload, assert_close, lora_case

FUNCTIONS = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leaky_relu": functional.leaky_relu,
    "identity": lambda z: z,
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def vectors(workload: Workload, size: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """One a slot; NaN for those that nobody wears."""
    random = torch.Generator().manual_seed(seed)
    out = torch.randn(len(workload.counts), size, generator=random)
    out[[s for s in range(len(workload.counts)) if s not in workload.slots]] = float("nan")
    return out.to(dtype)


@pytest.mark.parametrize("size", [300, 33, 7])
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_scale_rows(backend, dtype, name, size):
    workload = WORKLOADS[name]()
    scale = vectors(workload, size, dtype)
    storage = vectors(Workload(workload.slots, (1,) * len(workload.slots)), size + 3, dtype)
    storage = torch.randn(storage.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    storage[0, 0] = -0.0
    before, y = storage.clone(), storage[:, :size]
    one = workload.slots[0]
    if one >= 0:
        scale[one] = 1.0
    backend.scale_rows(y, scale, AdapterBatch.build(workload.slots, len(workload.counts)))
    expected = before.clone()
    for token, slot in enumerate(workload.slots):
        if slot >= 0:
            expected[token, :size] = (before[token, :size].float() * scale[slot].float()).to(dtype)
    assert torch.equal(bits(storage), bits(expected))
    kept = [t for t, s in enumerate(workload.slots) if s in (-1, one)]
    assert torch.equal(bits(storage[kept]), bits(before[kept])), "a token without a scale changed"


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("size", [576, 48, 33, 7])
@pytest.mark.parametrize("name", ["distinct", "skewed", "base_only", "last_slot", "empty_segment"])
def test_norm_rows(backend, dtype, name, size, centered):
    workload = WORKLOADS[name]()
    random = torch.Generator().manual_seed(4)
    gain = vectors(workload, size, dtype)
    x = (torch.randn(len(workload.slots), size, generator=random) * 3 + 1).to(dtype)
    y = torch.randn(len(workload.slots), size, generator=random).to(dtype)
    shift = torch.randn(size, generator=random).to(dtype) if centered else None
    has = torch.tensor([c % 2 or s % 2 for s, c in enumerate(workload.counts)], dtype=torch.int32)
    batch = AdapterBatch.build(workload.slots, len(workload.counts))
    before = y.clone()
    backend.norm_rows(y, x, gain, has, shift, batch, eps=1e-5, centered=centered)
    mine = [t for t, s in enumerate(workload.slots) if s >= 0 and has[s]]
    others = [t for t in range(len(workload.slots)) if t not in mine]
    d = x[mine].double()
    if centered:
        d = d - d.mean(-1, keepdim=True)
    d = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    d = d * gain[[workload.slots[t] for t in mine]].double()
    assert_close(y[mine], d if shift is None else d + shift.double())
    assert torch.equal(bits(y[others]), bits(before[others])), "a token without a gain changed"


def kinds_of(case: LoraCase) -> torch.Tensor:
    """Every function, every other one gated."""
    count = case.batch.num_slots
    return torch.tensor(
        [s % len(ACTIVATIONS) + GATED * (s // 2 % 2) for s in range(count)], dtype=torch.int32
    )


def down_bias(case: LoraCase) -> torch.Tensor:
    """Signed where a worn slot owns the row, NaN elsewhere."""
    out = torch.randn(case.a.shape[0], generator=torch.Generator().manual_seed(5))
    out[case.a[:, 0].isnan()] = float("nan")
    return out


def bottleneck_in_fp64(case: LoraCase, bias: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    out = case.y.double().clone()
    for token, slot in enumerate(case.batch.slots.tolist()):
        start, count = int(case.rows.start[slot]), int(case.rows.count[slot])
        if slot < 0 or not count:
            continue
        own = slice(start, start + count)
        z = case.a[own].double() @ case.x[token].double() + bias[own].double()
        kind = int(kinds[slot])
        gate = torch.sigmoid(z[-1]) if kind & GATED else torch.ones((), dtype=torch.float64)
        act = FUNCTIONS[ACTIVATIONS[kind & 255]](z[:-1])
        up = case.b[own].double()
        out[token] += gate * (act @ up[:-1] + up[-1])
    return out


@pytest.mark.parametrize("shape", [(576, 320), (33, 300), (7, 17)], ids=str)
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_bottleneck_add(backend, dtype, name, shape):
    case = lora_case(WORKLOADS[name](), *shape, dtype)
    bias, kinds = down_bias(case), kinds_of(case)
    storage, y = case.fresh_y()
    backend.bottleneck_add(y, case.x, case.a, case.b, bias, kinds, case.rows, case.batch)
    assert_close(y, bottleneck_in_fp64(case, bias, kinds))
    idle = [t for t, s in enumerate(case.batch.slots.tolist()) if s < 0 or case.rows.count[s] == 0]
    assert torch.equal(bits(y[idle]), bits(case.y[idle])), "a token without rows changed"
    assert torch.equal(bits(storage[:, shape[1] :]), bits(case.storage[:, shape[1] :]))


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_every_function_over_its_range(backend, kind):
    """Large values of both signs, where a bad approximation would overflow or drift."""
    z = torch.tensor([-90.0, -11.0, -3.0, -1.0, -0.1, 0.0, 0.2, 1.5, 4.0, 30.0, 95.0])
    batch = AdapterBatch.build([0] * len(z), 1)
    case = lora_case(Workload((0,), (2,)), 4, 4, torch.float32)
    down, up = torch.zeros(2, 1), torch.zeros(2, 1)
    down[0], up[0] = 1.0, 1.0
    case.rows.start[0] = 0
    y = torch.zeros(len(z), 1)
    kinds = torch.tensor([kind], dtype=torch.int32)
    backend.bottleneck_add(y, z[:, None], down, up, torch.zeros(2), kinds, case.rows, batch)
    expected = FUNCTIONS[ACTIVATIONS[kind]](z.double())
    assert torch.allclose(y[:, 0].double(), expected, rtol=2e-6, atol=1e-6)


def test_another_slots_bottleneck_changes_no_bit(backend, dtype):
    case = lora_case(WORKLOADS["ranks_mixed"](), 96, 80, dtype)
    bias, kinds = down_bias(case), kinds_of(case)
    results = []
    for factor in (1, -3):
        slot = case.batch.worn[-1]
        own = slice(int(case.rows.start[slot]), int(case.rows.start[slot] + case.rows.count[slot]))
        case.a[own] *= factor
        _, y = case.fresh_y()
        backend.bottleneck_add(y, case.x, case.a, case.b, bias, kinds, case.rows, case.batch)
        results.append(y)
    others = case.batch.slots != slot
    assert torch.equal(bits(results[0][others]), bits(results[1][others]))
    assert not torch.equal(results[0][~others], results[1][~others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"down_bias": torch.zeros(3)}, "down_bias must be float32"),
        (lambda c: {"kinds": torch.zeros(8)}, "kinds must be int32"),
        (lambda c: {"kinds": torch.zeros(2, dtype=torch.int32)}, "kinds must be int32"),
        (lambda c: {"x": c.x.half()}, "one dtype"),
        (lambda c: {"up": c.b[1:]}, "do not fit"),
    ],
    ids=["bias", "kinds", "slots", "dtype", "rank"],
)
def test_a_bottleneck_that_does_not_fit_is_refused(backend, change, message):
    case = lora_case(WORKLOADS["uniform"](), 32, 24, torch.float32)
    arguments = {"y": case.y, "x": case.x, "down": case.a, "up": case.b}
    arguments |= {"down_bias": down_bias(case), "kinds": kinds_of(case)}
    with pytest.raises(ValueError, match=message):
        backend.bottleneck_add(**(arguments | change(case)), rows=case.rows, batch=case.batch)


def test_rows_outside_the_pool_are_refused(backend):
    case = lora_case(Workload((0, 1), (4, 4)), 32, 32, torch.float32)
    case.rows.count[1] = 99
    with pytest.raises(ValueError, match="slot 1 owns rows"):
        backend.bottleneck_add(
            case.y, case.x, case.a, case.b, down_bias(case), kinds_of(case), case.rows, case.batch
        )


def test_scales_and_gains_that_do_not_fit_are_refused(backend):
    batch = AdapterBatch.build([0, 1], 2)
    y, gain, has = torch.zeros(2, 4), torch.ones(2, 4), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="scale"):
        backend.scale_rows(y, torch.zeros(2, 5), batch)
    for arguments, message in (
        ((y, y.half(), gain, has, None), "must be as y"),
        ((y, y, gain[:, 1:], has, None), "gain"),
        ((y, y, gain, has.float(), None), "has must be"),
        ((y, y, gain, has, torch.zeros(3)), "shift"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.norm_rows(*arguments, batch, eps=1e-6, centered=True)
