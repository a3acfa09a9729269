"""The Triton backend: the adapters' products here, attention by the object it is given, 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from manyhats_kernels.backend import SiteRows, check_bias, check_lora
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.static_batch import StaticAdapterBatch
from manyhats_kernels.triton.bias import bias_add
from manyhats_kernels.triton.lora import Between, Launcher, Site
from manyhats_kernels.triton.plan import TokenTiles, token_tiles
from manyhats_kernels.triton.quant import TritonFourBit

ACTIVATIONS = ("linear", "relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu")
"""Functions between a bottleneck's matrices, as AdapterHub names them; a slot's code is the place
in this tuple. ``gelu_new`` is the tanh form, ``leakyrelu`` has slope 0.01."""


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
    :class:`StaticAdapterBatch`; none waits for the device. So a worn slot whose rows lie outside
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
        self.lora_add_group((y,), x, (a,), (b,), (rows,), batch)

    def lora_add_group(
        self,
        ys: Sequence[Tensor],
        x: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        rows: Sequence[SiteRows],
        batch: AdapterBatch | StaticAdapterBatch,
    ) -> None:
        """``lora_add`` of several sites that read the same ``x``: two launches for every three.

        Raises ValueError when the sequences differ in length, and as ``lora_add`` does.
        """
        if not len(ys) == len(a) == len(b) == len(rows):
            raise ValueError(
                "ys, a, b and rows must name the same sites, got "
                f"{len(ys)}, {len(a)}, {len(b)} and {len(rows)}"
            )
        sites = [Site(*site) for site in zip(ys, a, b, rows, strict=True)]
        for site in sites:
            check_lora(site.y, x, site.a, site.b, site.rows, batch)
        self._launcher.add(sites, x, self._tiles_of(batch), max_rows=self._max_rank)

    def bottleneck_add(
        self,
        y: Tensor,
        h: Tensor,
        down: Tensor,
        up: Tensor,
        rows: SiteRows,
        activations: Tensor,
        batch: AdapterBatch | StaticAdapterBatch,
        *,
        inner_bias: Tensor | None = None,
        outer_bias: Tensor | None = None,
    ) -> None:
        """``y[t] += act_s(h[t] @ down_s.T + c_s) @ up_s + e_s`` in place, ``s = batch.slots[t]``.

        ``h`` is ``[T, in]``, ``y`` ``[T, out]``, ``down`` ``[R, in]``, ``up`` ``[R, out]`` and
        ``rows`` as in :meth:`lora_add`; c is the slot's run of ``inner_bias`` ``[R]``, e its row of
        ``outer_bias`` ``[slots, out]``, both contiguous and of the others' dtype; ``activations``,
        int32 ``[slots]``, has each slot's place in :data:`ACTIVATIONS`. Tokens of the base and of
        slots with no rows keep their bits. fp32 throughout, rounded once (Houlsby et al. 2019;
        AdapterHub's ``Adapter`` module). Raises ValueError on what does not fit.
        """
        check_lora(y, h, down, up, rows, batch)
        _check_between(y, down, activations, inner_bias, outer_bias, batch.num_slots)
        self._launcher.add(
            [Site(y, down, up, rows)],
            h,
            self._tiles_of(batch),
            max_rows=self._max_width,
            between=Between(activations, inner_bias, outer_bias),
        )

    def bias_add(self, y: Tensor, bias: Tensor, batch: AdapterBatch | StaticAdapterBatch) -> None:
        """See :meth:`Backend.bias_add`: one launch."""
        check_bias(y, bias, batch)
        if isinstance(batch, StaticAdapterBatch) or batch.segments:
            bias_add(y, bias, batch.slots)

    def _tiles_of(self, batch: AdapterBatch | StaticAdapterBatch) -> TokenTiles:
        """The plan's tiles, made once a plan."""
        if isinstance(batch, StaticAdapterBatch):
            return batch.tiles
        if batch not in self._tiles:
            self._tiles[batch] = token_tiles(batch)
        return self._tiles[batch]


def _check_between(
    y: Tensor,
    down: Tensor,
    activations: Tensor,
    inner_bias: Tensor | None,
    outer_bias: Tensor | None,
    num_slots: int,
) -> None:
    if activations.dtype != torch.int32 or activations.ndim != 1 or len(activations) < num_slots:
        raise ValueError(
            f"activations must be int32 [{num_slots}], got {activations.dtype} "
            f"{tuple(activations.shape)}"
        )
    for name, bias, wanted in (
        ("inner_bias", inner_bias, (down.shape[0],)),
        ("outer_bias", outer_bias, (num_slots, y.shape[1])),
    ):
        if bias is None:
            continue
        fits = bias.ndim == len(wanted) and bias.shape[0] >= wanted[0]
        if not fits or bias.shape[1:] != wanted[1:] or not bias.is_contiguous():
            raise ValueError(f"{name} must be contiguous {wanted}, got {tuple(bias.shape)}")
        if bias.dtype != y.dtype:
            raise ValueError(f"{name} must be of y's {y.dtype}, got {bias.dtype}")
