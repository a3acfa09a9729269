"""The Triton backend on a CUDA device: compiled, in every dtype, with the tiles that are served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux on x86-64 alone")

from manyhats_kernels import GATED, AdapterBatch, resolve
from manyhats_kernels.groups import SiteGroup, SiteWeights
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.static_batch import StaticAdapterBatch
from manyhats_kernels.testing import WORKLOADS, LoraCase, Workload, assert_close, lora_case

pytestmark = pytest.mark.gpu

SHAPES = ((576, 320), (4096, 1024), (2100, 333), (7, 17))


@pytest.fixture(scope="module")
def backend():
    return resolve("triton", device=torch.device("cuda"), cache_dir=Path("unused")).backend


def run(backend, case: LoraCase) -> torch.Tensor:
    _, y = case.fresh_y()
    backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload(backend, dtype, name, shape):
    case = lora_case(WORKLOADS[name](), *shape, dtype, device="cuda")
    storage, y = case.fresh_y()
    backend.lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    assert_close(y, run(ReferenceBackend(), case))
    idle = [t for t, s in enumerate(case.batch.slots.tolist()) if s < 0 or case.rows.count[s] == 0]
    assert torch.equal(y[idle], case.y[idle]), "a token without rows changed"
    assert storage[:, shape[1] :].isnan().all(), "something outside y was written"


def test_64_tokens_of_64_adapters_with_ranks_to_256(backend, dtype):
    counts = tuple(1 + (37 * slot) % 256 for slot in range(64))
    case = lora_case(Workload(tuple(range(64)), counts), 4096, 4096, dtype, device="cuda")
    assert_close(run(backend, case), run(ReferenceBackend(), case))


@pytest.mark.parametrize("name", ["distinct", "ranks_mixed", "long_segment"])
def test_another_adapters_weights_change_no_bit(backend, dtype, name):
    case = lora_case(WORKLOADS[name](), 576, 320, dtype, device="cuda")
    before = run(backend, case)
    changed = case.batch.worn[-1]
    start, count = int(case.rows.start[changed]), int(case.rows.count[changed])
    case.a[start : start + count] *= -3
    case.b[start : start + count] += 2
    after = run(backend, case)
    others = case.batch.slots != changed
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_the_same_step_gives_the_same_bits(backend, dtype):
    case = lora_case(WORKLOADS["zipf"](), 4096, 1024, dtype, device="cuda")
    first = run(backend, case)
    assert all(torch.equal(first, run(backend, case)) for _ in range(5))


def test_a_group_is_its_sites_one_by_one(backend, dtype):
    cases = [
        lora_case(WORKLOADS["ranks_mixed"](), 576, width, dtype, seed=width, device="cuda")
        for width in (576, 192, 192)
    ]
    x, batch = cases[0].x, cases[0].batch
    together, alone = ([case.fresh_y()[1] for case in cases] for _ in range(2))
    pools = [(case.a, case.b, case.rows) for case in cases]
    backend.lora_add_group(together, x, SiteGroup([SiteWeights(*pool) for pool in pools]), batch)
    for y, (a, b, rows) in zip(alone, pools, strict=True):
        backend.lora_add(y, x, a, b, rows, batch)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)


def test_a_captured_step_replays_every_plan_bit_by_bit(backend, dtype):
    """One capture, then other plans in its buffers: what eager computes of each."""
    counts, width = (16, 8, 64, 1), 576
    plan = StaticAdapterBatch(32, len(counts), "cuda")
    every = lora_case(Workload((0, 1, 2, 3) * 8, counts), width, width, dtype, device="cuda")
    y = every.y.clone()
    arguments = (y, every.x, every.a, every.b, every.rows, plan)
    backend.lora_add(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.lora_add(*arguments)
    for slots in ((3, -1, 0, 0), tuple(range(4)) * 8, (), (2,) * 32):
        plan.fill(slots)
        y.copy_(every.y)
        graph.replay()
        eager = AdapterBatch.build((*slots, *[-1] * (32 - len(slots))), len(counts), "cuda")
        expected = every.y.clone()
        backend.lora_add(expected, *arguments[1:5], eager)
        assert torch.equal(y, expected)
        assert slots == () or not torch.equal(y, every.y)


@pytest.mark.parametrize("name", ["distinct", "ranks_mixed", "long_segment", "empty_segment"])
def test_bottleneck_add(backend, dtype, name):
    workload = WORKLOADS[name]()
    case = lora_case(workload, 576, 576, dtype, device="cuda")
    bias = torch.randn(case.a.shape[0], device="cuda")
    kinds = [s % 7 + GATED * (s % 2) for s in range(len(workload.counts))]
    arguments = (case.x, case.a, case.b, bias, torch.tensor(kinds, device="cuda").int())
    (_, y), (_, expected) = case.fresh_y(), case.fresh_y()
    backend.bottleneck_add(y, *arguments, case.rows, case.batch)
    ReferenceBackend().bottleneck_add(expected, *arguments, case.rows, case.batch)
    assert_close(y, expected)
    base = case.batch.slots == -1
    assert torch.equal(y[base], case.y[base])


def test_bias_add_and_scale_rows(backend, dtype):
    case = lora_case(WORKLOADS["last_slot"](), 8, 1030, dtype, device="cuda")
    own = torch.randn(5, 1030, device="cuda").to(dtype)
    (_, y), (_, expected) = case.fresh_y(), case.fresh_y()
    for other, result in ((backend, y), (ReferenceBackend(), expected)):
        other.bias_add(result, own, case.batch)
        other.scale_rows(result, own, case.batch)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_norm_rows(backend, dtype, centered):
    case = lora_case(WORKLOADS["last_slot"](), 4096, 4096, dtype, device="cuda")
    gain, has = torch.randn(5, 4096, device="cuda").to(dtype), torch.ones(5, device="cuda").int()
    (_, y), (_, expected) = case.fresh_y(), case.fresh_y()
    for other, result in ((backend, y), (ReferenceBackend(), expected)):
        other.norm_rows(result, case.x, gain, has, gain[0], case.batch, eps=1e-6, centered=centered)
    assert_close(y, expected)
