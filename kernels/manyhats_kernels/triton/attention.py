"""Launchers of the paged attention.

PyTorch's own ``torch.nn.attention.varlen.varlen_attn`` takes block tables too, but only where
FlashAttention 3 or 4 was installed beside it and activated: with the FlashAttention 2 that it
carries, block tables are an error, as soft caps are in all three. So every step goes through these
kernels, which need nothing but Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats_kernels.backend import check_attention, check_store
from manyhats_kernels.batch import AttentionBatch
from manyhats_kernels.triton import attention_kernels as kernels
from manyhats_kernels.triton import cache_kernels

MAX_HEAD_DIM = 256

SPLITS = 16
"""Programs that share a long context: 128 in all for one sequence with 8 kv heads."""

CHUNK = 256
"""Places of a context that a program takes at least; a multiple of every tile's ``block_kv``."""

STORE_BLOCK = 1024
DECODE_WARPS = 4


@dataclass(frozen=True)
class AttentionTile:
    """Tiles for heads of up to ``head`` values of ``bits``.

    ``block_m`` rows (queries times the heads that share a kv head) and ``warps`` are a prefill's;
    decoding takes as few rows as the heads need, and :data:`DECODE_WARPS`.
    """

    bits: int
    head: int
    block_m: int
    block_kv: int
    warps: int
    stages: int


ATTENTION_TILES = (
    AttentionTile(bits=16, head=64, block_m=64, block_kv=64, warps=4, stages=2),
    AttentionTile(bits=16, head=128, block_m=128, block_kv=64, warps=8, stages=2),
    AttentionTile(bits=16, head=256, block_m=64, block_kv=32, warps=8, stages=2),
    AttentionTile(bits=32, head=128, block_m=16, block_kv=32, warps=4, stages=2),
    AttentionTile(bits=32, head=256, block_m=16, block_kv=16, warps=4, stages=2),
)
"""The first that fits is taken. Chosen by registers and shared memory, not yet measured."""


def tile_for(dim: int, dtype: torch.dtype) -> AttentionTile:
    """The first row of :data:`ATTENTION_TILES` that fits; ValueError over its largest head."""
    bits = 8 * dtype.itemsize
    for tile in ATTENTION_TILES:
        if tile.bits == bits and dim <= tile.head:
            return tile
    raise ValueError(f"head_dim {dim} is over {MAX_HEAD_DIM}, the largest of the Triton kernels")


def padded(size: int) -> int:
    """``size`` rounded up to a power of two, at least 16: what a tensor core's tile takes."""
    return max(16, 1 << (size - 1).bit_length())


class TritonAttention:
    """The attention half of a Triton backend; see :class:`manyhats_kernels.backend.Backend`.

    Sequences of one new token share their context among up to :data:`SPLITS` programs, longer ones
    are cut into tiles of queries; a step that has both takes both kernels. How a context is shared
    depends on its own length alone, so a sequence's result has the same bits in any batch. Nothing
    waits for the device, so decode steps can be captured in a CUDA graph; there a sequence of
    context 0 is padding (its output is 0) and a ``slot_mapping`` of -1 is not stored.
    """

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """``[num_blocks, kv_heads, block_size, head_dim]``."""
        return (num_blocks, kv_heads, block_size, head_dim)

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
    ) -> None:
        """See :meth:`Backend.store_kv`."""
        check_store(k, v, k_cache, v_cache, batch)
        tokens, kv_heads, dim = k.shape
        if not tokens:
            return
        cache_kernels.store_kernel[(tokens, -(-kv_heads * dim // STORE_BLOCK))](
            k,
            v,
            k_cache,
            v_cache,
            batch.slot_mapping,
            *k.stride(),
            *v.stride(),
            KV_HEADS=kv_heads,
            DIM=dim,
            BLOCK_SIZE=batch.block_size,
            BLOCK=STORE_BLOCK,
            num_warps=4,
        )

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
        """See :meth:`Backend.paged_attention`. ValueError for heads over :data:`MAX_HEAD_DIM`."""
        check_attention(q, k_cache, v_cache, batch, sliding_window, soft_cap)
        tile = tile_for(q.shape[2], q.dtype)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        call = _Call(out, q, k_cache, v_cache, batch, scale, sliding_window, soft_cap, tile)
        if batch.max_query_len > 1:
            call.prefill()
        if 1 in batch.host_query_lens:
            call.decode()
        return out


@dataclass(frozen=True, eq=False)
class _Call:
    """One call's arguments and its launches."""

    out: Tensor
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    scale: float
    window: int | None
    cap: float | None
    tile: AttentionTile

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.q.shape[1] // self.k_cache.shape[1]

    def _numbers(self) -> tuple[int | float, ...]:
        table = self.batch.block_tables
        return (
            *self.q.stride(),
            self.k_cache.stride(0),
            table.stride(0),
            self.scale,
            1.0 if self.cap is None else self.cap,
            0 if self.window is None else self.window,
        )

    def _shape(self) -> dict[str, int | bool | str]:
        dim = self.q.shape[2]
        return {
            "CAPPED": self.cap is not None,
            "WINDOWED": self.window is not None,
            "GROUP": self.group,
            "DIM": dim,
            "HEAD": padded(dim),
            "BLOCK_SIZE": self.batch.block_size,
            "BLOCK_KV": self.tile.block_kv,
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "num_stages": self.tile.stages,
        }

    def prefill(self) -> None:
        """The sequences of more than one new token."""
        batch, members = self.batch, 1 << (self.group - 1).bit_length()
        block_m = max(self.tile.block_m, members)
        tiles = batch.num_tokens // (block_m // members) + batch.num_sequences
        kernels.prefill_kernel[(tiles, self.k_cache.shape[1])](
            self.out,
            self.q,
            self.k_cache,
            self.v_cache,
            batch.query_start,
            batch.context_lens,
            batch.block_tables,
            batch.num_sequences,
            *self._numbers(),
            MEMBERS=members,
            BLOCK_M=block_m,
            num_warps=self.tile.warps,
            **self._shape(),
        )

    def decode(self) -> None:
        """The sequences of one new token, padding included."""
        batch, heads, dim = self.batch, self.q.shape[1], self.q.shape[2]
        longest = batch.max_context_len
        if self.window is not None:
            longest = min(longest, self.window)
        splits = max(1, min(SPLITS, -(-longest // CHUNK)))
        scratch: list[Tensor | None] = [None, None, None]
        if splits > 1:
            rows = (batch.num_sequences, heads, splits)
            scratch = [
                torch.empty(size, dtype=torch.float32, device=self.q.device)
                for size in ((*rows, dim), rows, rows)
            ]
        kernels.decode_kernel[(batch.num_sequences, self.k_cache.shape[1], splits)](
            self.out,
            *scratch,
            self.q,
            self.k_cache,
            self.v_cache,
            batch.query_start,
            batch.context_lens,
            batch.block_tables,
            *self._numbers(),
            BLOCK_M=padded(self.group),
            SPLITS=SPLITS,
            CHUNK=CHUNK,
            DIRECT=splits == 1,
            num_warps=DECODE_WARPS,
            **self._shape(),
        )
        if splits > 1:
            kernels.merge_kernel[(batch.num_sequences, heads)](
                self.out,
                *scratch,
                batch.query_start,
                batch.context_lens,
                splits,
                0 if self.window is None else self.window,
                WINDOWED=self.window is not None,
                DIM=dim,
                HEAD=padded(dim),
                SPLITS=SPLITS,
                CHUNK=CHUNK,
                num_warps=4,
            )
