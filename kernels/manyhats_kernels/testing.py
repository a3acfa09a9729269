"""Named workloads and a comparison that can fail, shared by the tests and the benchmarks.

The data is made so that a wrong kernel shows: values are signed, segments ragged, base tokens mixed
in, the pools' rows that no worn slot owns and the cache places that no sequence owns are NaN, and
``y`` is a window in a wider tensor whose margin must keep its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats_kernels.backend import SiteRows
from manyhats_kernels.batch import AdapterBatch, AttentionBatch

MARGIN = 3
"""Columns of NaN that the storage of x, y, a and b has beyond their own."""

Bounds = tuple[float, float]
TOLERANCE: dict[torch.dtype, Bounds] = {
    torch.float32: (1e-5, 2e-6),
    torch.float16: (1.0e-3, 5e-4),
    torch.bfloat16: (8.0e-3, 4e-3),
}
"""By dtype: bounds of the largest error over the largest value, and of the RMS error over the RMS.
A single value rounded to 16 bits is off by up to 2^-8 (bf16) or 2^-11 (fp16) of itself; two right
answers may differ by one unit in the last place where a rounding tips over."""


@dataclass(frozen=True)
class Workload:
    """Which slot each token wears and how many rank rows each slot owns."""

    slots: tuple[int, ...]
    counts: tuple[int, ...]


def _zipf() -> Workload:
    draw = np.random.default_rng(7).zipf(1.3, 40)
    return Workload(tuple(int(min(d, 12)) - 1 for d in draw), (8,) * 12)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "distinct": lambda: Workload(tuple(range(31, -1, -1)), (16,) * 32),
    "uniform": lambda: Workload(tuple(i % 8 for i in range(40)), (4,) * 8),
    "zipf": _zipf,
    "identical": lambda: Workload((2,) * 33, (5, 5, 5, 5)),
    "skewed": lambda: Workload((0,) * 29 + (1, 3, -1, 1), (8, 8, 8, 8)),
    "base_only": lambda: Workload((-1,) * 9, (4, 4)),
    "one_base_among_many": lambda: Workload((0, 1, 2, -1, 2, 1, 3, 0), (8,) * 4),
    "empty_segment": lambda: Workload((0, 1, 1, 2, -1, 1), (6, 0, 6)),
    "last_slot": lambda: Workload((4, -1, 4, 0), (3, 3, 3, 3, 3)),
    "ranks_mixed": lambda: Workload((3, 0, 1, 2, -1, 4, 3, 3, 1, 0, 2, 2, 2), (1, 7, 64, 16, 33)),
    "rank_1": lambda: Workload((0, 2, 1, 1, -1), (1, 1, 1)),
    "long_segment": lambda: Workload((1,) * 70 + (0, -1, 2) + (1,) * 60, (4, 16, 9)),
}
"""Every workload by its name."""


@dataclass(frozen=True, eq=False)
class LoraCase:
    """Arguments of ``lora_add``: windows in wider storage, whose margin is NaN.

    So is every row of ``a`` and ``b`` that no worn slot owns. ``storage`` is that of ``y``.
    """

    storage: Tensor
    y: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    rows: SiteRows
    batch: AdapterBatch

    def fresh_y(self) -> tuple[Tensor, Tensor]:
        """A copy of the storage and the window of it that takes ``y``'s place."""
        storage = self.storage.clone()
        return storage, storage[:, : self.y.shape[1]]


def windowed(values: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``values`` as a window in storage that is NaN to the right of it and below it."""
    height, width = values.shape
    storage = torch.full((height + 1, width + MARGIN), float("nan"), dtype=dtype, device=device)
    storage[:height, :width] = values.to(device)
    return storage[:height, :width]


def lora_case(
    workload: Workload,
    n_in: int,
    n_out: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LoraCase:
    """Signed data for ``workload``; values of ``x @ A.T @ B`` and of ``y`` are about 1."""
    random = torch.Generator().manual_seed(seed)
    slots, counts = workload.slots, workload.counts
    starts, pool_rows = [], 1  # row 0, and one row between slots, belong to nobody
    for slot in torch.randperm(len(counts), generator=random).tolist():
        starts.append((slot, pool_rows))
        pool_rows += counts[slot] + 1
    a = torch.full((pool_rows, n_in), float("nan"))
    b = torch.full((pool_rows, n_out), float("nan"))
    start = dict(starts)
    for slot in set(slots) - {-1}:
        own = slice(start[slot], start[slot] + counts[slot])
        a[own] = torch.randn(counts[slot], n_in, generator=random) * n_in**-0.5
        b[own] = torch.randn(counts[slot], n_out, generator=random) * max(counts[slot], 1) ** -0.5
    storage = torch.full((len(slots), n_out + MARGIN), float("nan"))
    storage[:, :n_out] = torch.randn(len(slots), n_out, generator=random)
    storage = storage.to(device, dtype)
    rows = SiteRows(
        torch.tensor([start[s] for s in range(len(counts))], dtype=torch.int32, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
    )
    return LoraCase(
        storage=storage,
        y=storage[:, :n_out],
        x=windowed(torch.randn(len(slots), n_in, generator=random), dtype, device),
        a=windowed(a, dtype, device),
        b=windowed(b, dtype, device),
        rows=rows,
        batch=AdapterBatch.build(slots, len(counts), device),
    )


@dataclass(frozen=True, eq=False)
class AttentionCase:
    """Arguments of ``paged_attention``; ``keys[i]``, ``values[i]`` are sequence i's, unpaged."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    keys: tuple[Tensor, ...]  # each [context, kv_heads, dim]
    values: tuple[Tensor, ...]


def attention_case(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> AttentionCase:
    """Signed data for sequences of (new tokens, context) whose shuffled blocks lie in a NaN cache.

    ``q`` is a transposed view, as a model's reshape leaves it.
    """
    random = torch.Generator().manual_seed(seed)
    needed = [-(-context // block_size) for _, context in lengths]
    ids = torch.randperm(sum(needed) + 3, generator=random).tolist()
    tables = [ids[sum(needed[:i]) : sum(needed[: i + 1])] for i in range(len(needed))]
    shape = (len(ids), kv_heads, block_size, dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    owned: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (_, context), table in zip(lengths, tables, strict=True):
        for cache, kept in zip(caches, owned, strict=True):
            rows = torch.randn(context, kv_heads, dim, generator=random).to(dtype)
            for at in range(context):
                cache[table[at // block_size], :, at % block_size] = rows[at]
            kept.append(rows)
    batch = AttentionBatch.build(
        [n for n, _ in lengths], [c for _, c in lengths], tables, block_size
    )
    q = torch.randn(heads, batch.num_tokens, dim, generator=random).to(dtype).transpose(0, 1)
    return AttentionCase(q, caches[0], caches[1], batch, tuple(owned[0]), tuple(owned[1]))


def assert_close(
    actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None, scale: float = 1e-30
) -> None:
    """AssertionError unless ``actual`` is finite and within :data:`TOLERANCE` of ``expected``.

    The bounds are those of ``dtype`` (default: ``actual``'s), the type that results are rounded to.
    Errors are measured against the expected values' size, or ``scale`` where that is larger (for
    so few values that terms of that size may cancel in all of them).
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not expected.isfinite().all():
        raise AssertionError("the expected values are not finite: the test itself is wrong")
    if not actual.isfinite().all():
        bad = (~actual.isfinite()).nonzero()
        raise AssertionError(f"{len(bad)} values are not finite, the first at {bad[0].tolist()}")
    if not actual.numel():
        return
    largest, rms = TOLERANCE[dtype or actual.dtype]
    wanted = expected.double()
    error = actual.double() - wanted
    worst = (error.abs().max() / wanted.abs().max().clamp_min(scale)).item()
    mean = (error.square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(scale)).item()
    if worst > largest or mean > rms:
        at = np.unravel_index(int(error.abs().argmax()), tuple(error.shape))
        raise AssertionError(
            f"largest relative error {worst:.3g} (bound {largest:.3g}) at {[int(i) for i in at]}, "
            f"RMS {mean:.3g} (bound {rms:.3g})"
        )
