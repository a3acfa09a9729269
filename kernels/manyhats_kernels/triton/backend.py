"""The Triton backend: the adapters' products here, attention by the object it is given, 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import Tensor

from manyhats_kernels.backend import (
    SiteRows,
    check_bias,
    check_bottleneck,
    check_lora,
    check_norm,
)
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.fourbit import Expand
from manyhats_kernels.groups import AdaptedFourBit, SiteGroup
from manyhats_kernels.static_batch import StaticAdapterBatch, StaticRows, any_worn
from manyhats_kernels.triton.lora import Between, Launcher, Site
from manyhats_kernels.triton.plan import TokenTiles, token_tiles
from manyhats_kernels.triton.quant import EXPAND_UP_TO, TritonFourBit
from manyhats_kernels.triton.rows import combine_rows, norm_rows


class Attention(Protocol):
    """The part of :class:`manyhats_kernels.backend.Backend` that this backend has done for it."""

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """See :meth:`Backend.kv_cache_shape`."""

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
    ) -> None:
        """See :meth:`Backend.store_kv`."""

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """See :meth:`Backend.paged_attention`."""


class TritonBackend(TritonFourBit):
    """Grouped kernels on one CUDA device; see :class:`manyhats_kernels.backend.Backend`.

    Adapters' operations take an :class:`AdapterBatch` or, for steps captured in a CUDA graph, a
    :class:`StaticAdapterBatch` (those that look at a row's slot alone also its
    :class:`StaticRows`); none waits for the device. So a worn slot whose rows lie outside
    the pool, or are more than ``max_rank`` (``max_width`` for a bottleneck), raises nothing: its
    tokens become NaN. Both bound the scratch memory, 4 bytes a token and row.
    """

    name = "triton"
    takes_static_plans = True

    def __init__(
        self,
        attention: Attention,
        launcher: Launcher,
        *,
        max_rank: int = 256,
        max_width: int = 1024,
    ) -> None:
        if max_rank < 1 or max_width < 1:
            raise ValueError(f"max_rank and max_width must be >= 1, got {max_rank} and {max_width}")
        self._attention = attention
        self._launcher = launcher
        self._max_rank = max_rank
        self._max_width = max_width
        self._tiles: WeakKeyDictionary[AdapterBatch, TokenTiles] = WeakKeyDictionary()
        self.kv_cache_shape = attention.kv_cache_shape
        self.store_kv = attention.store_kv
        self.paged_attention = attention.paged_attention

    @property
    def max_rank(self) -> int:
        """The most rank rows that a slot may own at a site."""
        return self._max_rank

    def lora_add(
        self,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        rows: SiteRows,
        batch: AdapterBatch | StaticAdapterBatch,
    ) -> None:
        """See :meth:`Backend.lora_add`: two launches."""
        check_lora(y, x, a, b, rows, batch)
        sites = [Site(y, a, b, rows)]
        self._launcher.add(sites, x, self._tiles_of(batch), max_rows=self._max_rank)

    def lora_add_group(
        self,
        ys: Sequence[Tensor],
        x: Tensor,
        group: SiteGroup,
        batch: AdapterBatch | StaticAdapterBatch,
    ) -> None:
        """See :meth:`Backend.lora_add_group`: two launches for every three sites."""
        group.check(ys, x, batch.num_tokens, batch.num_slots)
        sites = [Site(y, s.a, s.b, s.rows) for y, s in zip(ys, group.sites, strict=True)]
        self._launcher.add(sites, x, self._tiles_of(batch), max_rows=self._max_rank)

    def matmul_4bit_lora_group(
        self,
        x: Tensor,
        group: AdaptedFourBit,
        worn: Sequence[bool],
        batch: AdapterBatch | StaticAdapterBatch,
    ) -> list[Tensor]:
        """See :meth:`FusedFourBit.matmul_4bit_lora_group`.

        Up to :data:`EXPAND_UP_TO` tokens: a shrink for every three sites, then the products, each
        with its expand as the epilogue. Above: the products, then :meth:`lora_add_group`.
        """
        group.check(x, worn, batch)
        tiles = self._tiles_of(batch)
        sites = [site for site, here in zip(group.sites.sites, worn, strict=True) if here]
        products = tuple(zip(group.weights, group.biases, strict=True))
        if not sites or not tiles.count or x.shape[0] > EXPAND_UP_TO:
            ys = [self.matmul_4bit(x, weight, bias) for weight, bias in products]
            own = [y for y, here in zip(ys, worn, strict=True) if here]
            added = [Site(y, s.a, s.b, s.rows) for y, s in zip(own, sites, strict=True)]
            self._launcher.add(added, x, tiles, max_rows=self._max_rank)
            return ys
        halves = iter(self._launcher.shrink(sites, x, tiles, max_rows=self._max_rank))
        expands = [
            Expand(next(halves), site.b, site.rows, batch) if here else None
            for site, here in zip(group.sites.sites, worn, strict=True)
        ]
        return [
            self.matmul_4bit(x, weight, bias, expand)
            for (weight, bias), expand in zip(products, expands, strict=True)
        ]

    def bottleneck_add(
        self,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor,
        kinds: Tensor,
        rows: SiteRows,
        batch: AdapterBatch | StaticAdapterBatch,
    ) -> None:
        """See :meth:`Backend.bottleneck_add`: two launches."""
        check_lora(y, x, down, up, rows, batch)
        check_bottleneck(down, down_bias, kinds, batch)
        _check_strides(down_bias, kinds)
        self._launcher.add(
            [Site(y, down, up, rows)],
            x,
            self._tiles_of(batch),
            max_rows=self._max_width,
            between=Between(down_bias, kinds),
        )

    def bias_add(
        self, y: Tensor, bias: Tensor, batch: AdapterBatch | StaticAdapterBatch | StaticRows
    ) -> None:
        """See :meth:`Backend.bias_add`: one launch."""
        check_bias(y, bias, batch)
        _check_strides(y, bias)
        if any_worn(batch):
            combine_rows(y, bias, batch.slots, scale=False)

    def scale_rows(
        self, y: Tensor, scale: Tensor, batch: AdapterBatch | StaticAdapterBatch | StaticRows
    ) -> None:
        """See :meth:`Backend.scale_rows`: one launch."""
        check_bias(y, scale, batch, "scale")
        _check_strides(y, scale)
        if any_worn(batch):
            combine_rows(y, scale, batch.slots, scale=True)

    def norm_rows(
        self,
        y: Tensor,
        x: Tensor,
        gain: Tensor,
        has: Tensor,
        shift: Tensor | None,
        batch: AdapterBatch | StaticAdapterBatch | StaticRows,
        *,
        eps: float,
        centered: bool,
    ) -> None:
        """See :meth:`Backend.norm_rows`: one launch."""
        check_norm(y, x, gain, has, shift, batch)
        _check_strides(y, x, gain, has, *(() if shift is None else (shift,)))
        if any_worn(batch):
            norm_rows(y, x, gain, has, shift, batch.slots, eps=eps, centered=centered)

    def _tiles_of(self, batch: AdapterBatch | StaticAdapterBatch) -> TokenTiles:
        """The plan's tiles, made once a plan."""
        if isinstance(batch, StaticAdapterBatch):
            return batch.tiles
        if batch not in self._tiles:
            self._tiles[batch] = token_tiles(batch)
        return self._tiles[batch]


def _check_strides(*tensors: Tensor) -> None:
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in tensors):
        raise ValueError("the last dimension of every tensor must be contiguous")
