"""Launches of the grouped shrink and expand: all adapters of a step, up to three sites at once.

    mid[t] = x[t] @ A_s.T          (shrink)
    y[t] += f(mid[t]) @ B_s        (expand)

where ``s`` is the slot of the tile that holds token ``t``, and A_s, B_s the slot's rows of the
pools. The arithmetic is that of :class:`manyhats_kernels.backend.Backend`; punica's SGMV has the
same two halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from manyhats_kernels.backend import SiteRows
from manyhats_kernels.groups import SiteWeights
from manyhats_kernels.triton import lora_kernels
from manyhats_kernels.triton.plan import TokenTiles
from manyhats_kernels.triton.tiles import Tile, TileTable

T = TypeVar("T")

SITES = 3
"""Sites that one launch serves."""


@dataclass(frozen=True, eq=False)
class Site:
    """One site's arguments: ``y`` [T, out] and the pools ``a`` [R, in], ``b`` [R, out]."""

    y: Tensor
    a: Tensor
    b: Tensor
    rows: SiteRows


@dataclass(frozen=True, eq=False)
class Between:
    """What a bottleneck does between shrink and expand: see ``Backend.bottleneck_add``."""

    down_bias: Tensor
    kinds: Tensor


@dataclass(frozen=True, eq=False)
class Launcher:
    """Launches for one chip (``"sm_90"``; see ``tiles.py``)."""

    table: TileTable
    chip: str

    def add(
        self,
        sites: Sequence[Site],
        x: Tensor,
        tiles: TokenTiles,
        *,
        max_rows: int,
        between: Between | None = None,
    ) -> None:
        """Add each site's product to its ``y``; arguments must have been checked.

        A worn slot of more than ``max_rows`` rows, or of rows outside the pool, cannot be refused
        without waiting for the device: its tokens become NaN, and no foreign memory is read.
        """
        if not tiles.count:
            return
        for group in _groups(sites):
            mid = self._shrink(group, x, tiles, max_rows)
            bits = 8 * x.dtype.itemsize
            widest = max(site.y.shape[1] for site in group)
            tile = self.table.pick(self.chip, "expand", tiles.tokens, bits, widest)
            launch_expand(mid, group, tiles, tile, between)

    def shrink(
        self, sites: Sequence[SiteWeights], x: Tensor, tiles: TokenTiles, *, max_rows: int
    ) -> list[Tensor]:
        """Each site's first half, fp32 [parts, T, width] as ``Expand`` has it.

        Of tokens and columns that no worn slot's rows fill it holds whatever was in the memory.
        Arguments must have been checked, and the tiles be of some tokens.
        """
        return [
            half for group in _groups(sites) for half in self._shrink(group, x, tiles, max_rows)
        ]

    def _shrink(
        self, sites: Sequence[Site | SiteWeights], x: Tensor, tiles: TokenTiles, max_rows: int
    ) -> Tensor:
        bits = 8 * x.dtype.itemsize
        tile = self.table.pick(self.chip, "shrink", tiles.tokens, bits, x.shape[1])
        rank_cap = min(max_rows, max(site.a.shape[0] for site in sites))
        mid = torch.empty(
            (len(sites), tile.split, x.shape[0], rank_cap), dtype=torch.float32, device=x.device
        )
        launch_shrink(mid, sites, x, tiles, tile)
        return mid


def launch_shrink(
    mid: Tensor, sites: Sequence[Site | SiteWeights], x: Tensor, tiles: TokenTiles, tile: Tile
) -> None:
    """Fill ``mid``, fp32 [sites, split, T, rank_cap], where a worn slot has rows."""
    lora_kernels.shrink_kernel[(tiles.count, tile.split, len(sites))](
        mid,
        x,
        tiles.order,
        tiles.table,
        *_three([site.a for site in sites]),
        *_runs(sites),
        *_three([site.a.stride(0) for site in sites]),
        x.stride(0),
        x.shape[1],
        mid.shape[2],
        mid.shape[3],
        BLOCK_T=tile.tokens,
        BLOCK_R=tile.ranks,
        BLOCK_K=tile.span,
        SPLIT_K=tile.split,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def launch_expand(
    mid: Tensor, sites: Sequence[Site], tiles: TokenTiles, tile: Tile, between: Between | None
) -> None:
    """Add the products of ``mid`` to every site's ``y``.

    16-bit rows of B are exact in TF32, so three TF32 products of the fp32 ``mid`` are as good as
    one in fp32.
    """
    widest = max(site.y.shape[1] for site in sites)
    lora_kernels.expand_kernel[(tiles.count, -(-widest // tile.span), len(sites))](
        mid,
        tiles.order,
        tiles.table,
        *_three([site.y for site in sites]),
        *_three([site.b for site in sites]),
        *_runs(sites),
        *_three([site.y.stride(0) for site in sites]),
        *_three([site.b.stride(0) for site in sites]),
        *_three([site.y.shape[1] for site in sites]),
        between.down_bias if between else None,
        between.kinds if between else None,
        mid.shape[2],
        mid.shape[3],
        BLOCK_T=tile.tokens,
        BLOCK_R=tile.ranks,
        BLOCK_N=tile.span,
        SPLIT_K=mid.shape[1],
        PRECISION="tf32x3" if tile.bits == 16 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def _runs(sites: Sequence[Site | SiteWeights]) -> Iterator[Tensor | int]:
    """The arguments start0 to pool_rows2 of both kernels."""
    yield from _three([site.rows.start for site in sites])
    yield from _three([site.rows.count for site in sites])
    yield from _three([site.a.shape[0] for site in sites])


def _three(values: list[T]) -> list[T]:
    """The values, the last one repeated until there are three."""
    return values + values[-1:] * (SITES - len(values))


def _groups(sites: Sequence[T]) -> Iterator[Sequence[T]]:
    """Runs of up to three sites."""
    for begin in range(0, len(sites), SITES):
        yield sites[begin : begin + SITES]
