"""Row-wise arithmetic of sampling: the maximum, the filters' cut-off and the draw.

Every result of a row is a function of that row alone, bit for bit: reductions run over the last
dimension in a grouping fixed by the vocabulary's size, never by the number of rows, and no filter
depends on the order that a sort gives to equal values (a filter is a threshold: ties stay or go
together).

A two-level form (blocks of 256 columns) is used wherever one pass over [R, V] has to find a place
in it: on CPUs torch's ``argmax`` and ``topk`` over a whole row are many times slower than a
block-wise ``amax``. The distribution itself is padded to whole blocks with columns of weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

BLOCK: Final = 256
"""Columns in a block of the two-level reductions."""

_WINDOW: Final = 64
"""How many of the largest values the first attempt at a cut-off looks at."""

_WINDOW_BLOCK: Final = 64
"""Columns in a block of the search for those."""


@dataclass(frozen=True, slots=True)
class Filters:
    """top_k, top_p and min_p of R rows on the device, each [R]; switched off by 0, 1 and 0.

    ``sorted_rows``: [S] int64, the rows with top_k or top_p. ``top_k`` int64, ``top_p`` float64,
    ``min_p`` float32. ``small_k``: no top_k is over the window. ``any``: some filter is on.
    """

    sorted_rows: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    small_k: bool
    any: bool

    @classmethod
    def build(
        cls, top_k: list[int], top_p: list[float], min_p: list[float], device: torch.device
    ) -> Filters:
        """From each row's parameters (0, 1.0 and 0.0: off)."""
        rows = [i for i, (k, p) in enumerate(zip(top_k, top_p, strict=True)) if k > 0 or p < 1.0]
        return cls(
            sorted_rows=torch.tensor(rows, dtype=torch.int64, device=device),
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device),
            top_p=torch.tensor(top_p, dtype=torch.float64, device=device),
            min_p=torch.tensor(min_p, dtype=torch.float32, device=device),
            small_k=max(top_k, default=0) <= _WINDOW,
            any=bool(rows) or any(m > 0.0 for m in min_p),
        )


def padded_width(vocab: int) -> int:
    """``vocab`` rounded up to whole blocks."""
    return -(-vocab // BLOCK) * BLOCK


def row_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row of ``logits`` [R, V] and its column, lowest first among equals.

    Returns ([R] of the logits' dtype, [R] int64). A row with a NaN gives NaN.
    """
    rows, vocab = logits.shape
    blocks = vocab // BLOCK
    if logits.is_cuda or blocks < 2:
        best = logits.max(dim=-1)
        return best.values, best.indices
    whole = _blocked(logits, blocks, BLOCK)
    values, block = whole.amax(dim=-1).max(dim=-1)
    column = whole[torch.arange(rows), block].argmax(dim=-1) + block * BLOCK
    if blocks * BLOCK < vocab:
        tail = logits[:, blocks * BLOCK :].max(dim=-1)
        take = (tail.values > values) | (tail.values.isnan() & ~values.isnan())
        values = torch.where(take, tail.values, values)
        column = torch.where(take, tail.indices + blocks * BLOCK, column)
    return values, column


def _blocked(values: Tensor, blocks: int, width: int) -> Tensor:
    """The first ``blocks * width`` columns of [R, V] as [R, blocks, width], without a copy."""
    return values[:, : blocks * width].view(values.shape[0], blocks, width)


def top_values(weights: Tensor, k: int) -> Tensor:
    """The ``k`` largest values of each row of ``weights`` [R, nb * BLOCK], descending: [R, k]."""
    rows, width = weights.shape
    if weights.is_cuda:
        return weights.topk(k, dim=-1).values
    if k > _WINDOW:
        # numpy sorts plain values with SIMD; torch sorts (value, index) pairs, 30 times slower.
        ordered = np.sort(weights.numpy(), axis=-1)[:, ::-1][:, :k]
        return torch.from_numpy(np.ascontiguousarray(ordered))
    blocks = width // _WINDOW_BLOCK
    if blocks <= k:
        return weights.topk(k, dim=-1).values
    # The k largest values lie in the k blocks whose maxima are largest (a value in any other block
    # has k values before it), so only those are searched.
    whole = _blocked(weights, blocks, _WINDOW_BLOCK)
    chosen = whole.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    candidates = whole[torch.arange(rows).unsqueeze(-1), chosen]
    return candidates.flatten(1).topk(k, dim=-1).values


def _cut(
    values: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, whole: bool
) -> tuple[Tensor, Tensor]:
    """Cut-off by top_k, then top_p, from each row's K largest weights, and whether K sufficed.

    ``values`` [S, K] descending fp32; ``totals`` [S] float64: the row's whole mass. ``whole``: K is
    the row. Returns ([S] fp32 smallest weight that stays, [S] bool).
    """
    width = values.shape[1]
    limited = top_k > 0
    kth = values.gather(1, (top_k.clamp(1, width) - 1).unsqueeze(1))
    kth = torch.where(limited.unsqueeze(1), kth, 0.0)
    # With ties of the k-th value, as transformers' TopKLogitsWarper keeps them.
    last = (values >= kth).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    mass = values.double().cumsum(dim=-1)
    kept = mass.gather(1, last).squeeze(1)
    wanted = torch.where(limited, kept, totals) * top_p
    # A token stays while the mass before it is less than top_p, so the first always does.
    place = torch.searchsorted(mass, wanted.unsqueeze(1)).clamp(max=width - 1)
    nucleus = values.gather(1, place)
    cut = torch.where((top_p < 1.0).unsqueeze(1), torch.maximum(nucleus, kth), kth).squeeze(1)
    if whole:
        return cut, torch.ones_like(limited)
    k_known = ~limited | ((top_k <= width) & (values[:, -1] < kth.squeeze(1)))
    p_known = (top_p >= 1.0) | (kept >= wanted)
    return cut, k_known & p_known


def cutoffs(weights: Tensor, totals: Tensor, filters: Filters) -> Tensor:
    """The smallest weight of each row that survives top_k, top_p and min_p: [R] fp32.

    ``weights`` [R, nb * BLOCK] fp32 are each row's probabilities after temperature; ``totals`` [R]
    float64 are their sums. Order and meaning are those of transformers' generation
    (``TopKLogitsWarper``, ``TopPLogitsWarper``, ``MinPLogitsWarper``): top_k keeps the k largest
    (and ties of the k-th); top_p, over what top_k left, keeps the most likely tokens until their
    mass reaches p (and ties of the last); min_p keeps what is at least min_p times the likeliest.
    """
    cut = filters.min_p * weights.amax(dim=-1)
    rows, full = filters.sorted_rows, weights.shape[1]
    width = min(_WINDOW, full) if filters.small_k else full
    while rows.numel():
        picked = weights if rows.numel() == weights.shape[0] else weights[rows]
        values = top_values(picked, width)
        top_k, top_p = filters.top_k[rows], filters.top_p[rows]
        found, known = _cut(values, totals[rows], top_k, top_p, width == full)
        settled = rows[known]
        cut[settled] = torch.maximum(cut[settled], found[known])
        rows, width = rows[~known], full
    return cut


def block_mass(weights: Tensor) -> Tensor:
    """Running mass after each block of ``weights`` [R, nb * BLOCK] fp32: [R, nb] float64."""
    rows, width = weights.shape
    sums = weights.view(rows, width // BLOCK, BLOCK).sum(dim=-1)
    return sums.double().cumsum(dim=-1)


def inverse_cdf(weights: Tensor, mass: Tensor, uniforms: Tensor) -> Tensor:
    """The column at which each row's running weight first exceeds ``uniforms * total``: [R] int64.

    ``weights`` [R, nb * BLOCK] fp32, non-negative, not all zero; ``mass`` is
    ``block_mass(weights)``; ``uniforms`` [R] float64 in [0, 1). A column of zero weight is never
    returned.
    """
    rows, width = weights.shape
    target = uniforms.unsqueeze(1) * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True).clamp(max=mass.shape[1] - 1)
    before = torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0.0)
    own = mass.gather(1, block) - before
    view = weights.view(rows, width // BLOCK, BLOCK)
    inner = view[torch.arange(rows, device=weights.device), block.squeeze(1)]
    running = inner.double().cumsum(dim=-1)
    end = running[:, -1:]
    # The block's fp32 sum and its float64 running sum differ by rounding: rescale, and stay below
    # the end.
    rest = torch.minimum((target - before) / own * end, torch.nextafter(end, torch.zeros_like(end)))
    column = torch.searchsorted(running, rest, right=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + column).squeeze(1)
