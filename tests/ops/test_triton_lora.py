"""The Triton backend's lora_add, lora_add_group and bias_add against the reference.

On a machine without a GPU the kernels run in Triton's interpreter (see tests/conftest.py), in fp16
and fp32: its bf16 products are wrong. test_triton_gpu.py has the rest.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_backend import DEVICE, bits, triton_backend

from manyhats_kernels import AdapterBatch, Backend, SiteRows
from manyhats_kernels.groups import SiteGroup, SiteWeights
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.testing import WORKLOADS, LoraCase, Workload, assert_close, lora_case
from manyhats_kernels.triton.tiles import TileTable

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

CASES = [(torch.float32, (33, 150)), (torch.float16, (70, 40))]


def run(case: LoraCase, backend: Backend | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    storage, y = case.fresh_y()
    (backend or triton_backend()).lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    return storage, y


def idle(case: LoraCase) -> list[int]:
    slots = case.batch.slots.tolist()
    return [t for t, s in enumerate(slots) if s < 0 or case.rows.count[s] == 0]


def check(case: LoraCase, backend: Backend | None = None, scale: float = 1e-30) -> None:
    storage, y = run(case, backend)
    assert_close(y, run(case, ReferenceBackend())[1], scale=scale)
    assert torch.equal(bits(y[idle(case)]), bits(case.y[idle(case)])), "an idle token changed"
    margin = slice(case.y.shape[1], None)
    assert torch.equal(bits(storage[:, margin]), bits(case.storage[:, margin]))


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload(name, dtype, shape):
    check(lora_case(WORKLOADS[name](), *shape, dtype, device=DEVICE))


@pytest.mark.parametrize("name", ["ranks_mixed", "long_segment"])
def test_with_the_tiles_that_are_served(name):
    backend = triton_backend(TileTable.load())
    check(lora_case(WORKLOADS[name](), 300, 280, torch.float16, device=DEVICE), backend)


def test_ranks_to_256():
    workload = Workload((0, 1, 2, 1, -1), (256, 1, 255))
    check(lora_case(workload, 20, 24, torch.float32, device=DEVICE))


def test_accumulates_in_fp32_and_rounds_once():
    """In 16 bits nearly every value equals the reference's: sums in 16 bits would not."""
    case = lora_case(WORKLOADS["ranks_mixed"](), 300, 100, torch.float16, device=DEVICE, seed=3)
    wrong = run(case)[1] != run(case, ReferenceBackend())[1]
    assert wrong.float().mean() < 1e-2


@st.composite
def small_workloads(draw):
    counts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    slots = draw(st.lists(st.integers(-1, len(counts) - 1), max_size=8))
    return Workload(tuple(slots), tuple(counts))


@settings(max_examples=15)
@given(
    workload=small_workloads(),
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 70),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_drawn_workloads(workload, n_in, n_out, dtype):
    check(lora_case(workload, n_in, n_out, dtype, device=DEVICE), scale=1.0)


@pytest.mark.parametrize("name", ["one_base_among_many", "ranks_mixed", "skewed"])
def test_another_adapters_weights_change_no_bit(name):
    case = lora_case(WORKLOADS[name](), 33, 40, torch.float16, device=DEVICE)
    before = run(case)[1]
    changed = case.batch.worn[-1]
    start, count = int(case.rows.start[changed]), int(case.rows.count[changed])
    case.a[start : start + count] *= -3
    case.b[start : start + count] += 2
    after = run(case)[1]
    others = case.batch.slots != changed
    assert torch.equal(bits(before[others]), bits(after[others]))
    assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("sites", [2, 4])
def test_a_group_is_its_sites_one_by_one(sites):
    workload = WORKLOADS["ranks_mixed"]()
    widths = (64, 17, 80, 5)[:sites]
    cases = [
        lora_case(workload, 33, width, torch.float32, seed=i, device=DEVICE)
        for i, width in enumerate(widths)
    ]
    x, batch = cases[0].x, cases[0].batch
    # the columns of one fused projection, as q, k and v are
    together = torch.cat([case.y for case in cases], dim=1)
    alone = together.clone()
    backend = triton_backend()
    backend.lora_add_group(
        together.split(widths, 1),
        x,
        SiteGroup([SiteWeights(case.a, case.b, case.rows) for case in cases]),
        batch,
    )
    for y, case in zip(alone.split(widths, 1), cases, strict=True):
        backend.lora_add(y, x, case.a, case.b, case.rows, batch)
    assert torch.equal(bits(together), bits(alone))


def test_a_group_of_unequal_sequences_is_refused():
    case = lora_case(WORKLOADS["uniform"](), 8, 8, torch.float32, device=DEVICE)
    group = SiteGroup([SiteWeights(case.a, case.b, case.rows)])
    with pytest.raises(ValueError, match="2 outputs for 1 sites"):
        triton_backend().lora_add_group([case.y, case.y], case.x, group, case.batch)


def test_rows_updated_in_place_are_seen():
    case = lora_case(Workload((0, 0), (4, 4)), 32, 32, torch.float32, device=DEVICE)
    count = case.rows.count.clone()
    case.rows.count[0] = 0
    assert torch.equal(bits(run(case)[1]), bits(case.y))
    case.rows.count.copy_(count)
    check(case)


@pytest.mark.parametrize("tokens", [0, 3], ids=["none", "base"])
def test_nothing_is_launched_for_nobody(tokens, monkeypatch):
    case = lora_case(Workload((-1,) * tokens, (4,)), 32, 32, torch.float32, device=DEVICE)
    for name in ("launch_shrink", "launch_expand"):
        monkeypatch.setattr(f"manyhats_kernels.triton.lora.{name}", None)
    monkeypatch.setattr("manyhats_kernels.triton.backend.combine_rows", None)
    assert torch.equal(bits(run(case)[1]), bits(case.y))
    triton_backend().bias_add(case.y, torch.ones(1, 32, device=DEVICE), case.batch)


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 99), (-1, 2), (2**30, 1), (2**31 - 1, 5), (0, -1), (0, 6)],
    ids=["long", "low", "far", "overflow", "negative", "rank"],
)
def test_rows_that_cannot_be_read_make_their_tokens_nan(start, count):
    case = lora_case(Workload((0, 1, -1), (4, 4)), 32, 32, torch.float32, device=DEVICE)
    expected = run(case, ReferenceBackend())[1]
    case.rows.start[1], case.rows.count[1] = start, count
    _, y = run(case, triton_backend(max_rank=5))
    assert y[1].isnan().all()
    assert_close(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"x": c.x.half()}, "one dtype"),
        (lambda c: {"x": c.x[:, :-1]}, "do not fit"),
        (lambda c: {"b": c.b[1:]}, "do not fit"),
        (lambda c: {"x": c.x[:-1], "y": c.y[:-1]}, "the plan has"),
        (lambda c: {"rows": SiteRows(c.rows.start[:-1], c.rows.count[:-1])}, "rows cover"),
    ],
    ids=["dtype", "in", "rank", "tokens", "slots"],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    case = lora_case(WORKLOADS["uniform"](), 32, 24, torch.float32, device=DEVICE)
    arguments = {"y": case.y, "x": case.x, "a": case.a, "b": case.b, "rows": case.rows}
    with pytest.raises(ValueError, match=message):
        triton_backend().lora_add(**(arguments | change(case)), batch=case.batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("slots", [(2, -1, 0, 2), (-1, -1), (1,) * 40], ids=str)
def test_bias_add(dtype, slots):
    random = torch.Generator().manual_seed(1)
    width = 1030  # two programs a token
    bias = torch.randn(3, width, generator=random).to(DEVICE, dtype)
    bias[[s for s in range(3) if s not in slots]] = float("nan")
    storage = torch.randn(len(slots), width + 3, generator=random).to(DEVICE, dtype)
    expected = storage.clone()
    batch = AdapterBatch.build(slots, 3, DEVICE)
    triton_backend().bias_add(storage[:, :width], bias, batch)
    ReferenceBackend().bias_add(expected[:, :width], bias, batch)
    assert torch.equal(bits(storage), bits(expected))


def test_the_protocol_is_kept():
    backend = triton_backend()
    assert isinstance(backend, Backend)
    assert backend.name == "triton"
    with pytest.raises(ValueError, match="max_rank"):
        triton_backend(max_rank=0)
