"""The launchers of the C kernels."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from manyhats_kernels import reference_4bit
from manyhats_kernels.backend import (
    SiteRows,
    check_attention,
    check_bias,
    check_lora,
    check_run,
    check_store,
)
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.cpu import attend_sequence
from manyhats_kernels.fourbit import FourBitWeight, check_matmul_4bit
from manyhats_kernels.groups import DenseWeight, MatrixGroup, SiteGroup, SiteWeights
from manyhats_kernels.native.build import build, load
from manyhats_kernels.native.dense import NativeDense
from manyhats_kernels.native.parts import (
    DTYPE_CODES,
    PREFILL_QUERIES,
    NativeParts,
    check_memory,
)
from manyhats_kernels.native.stack import NativeStack
from manyhats_kernels.stack import MAX_HEAD_DIM

DOTS_ROWS = 64
"""Rows up to which the product with 4-bit weights by dot products beats unpacking and oneDNN."""

_P, _L, _I, _F = c_void_p, c_int64, c_int, c_float
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "mh_lora_add": (_L, [_I, _I, _I, _P, _L, _P, _L, _L, _P, _P, _P, _L]),
    "mh_bias_add": (None, [_I, _I, _P, _L, _P, _L, _L, _P, _P, _L]),
    "mh_store_kv": (None, [_L, _I, _P, _P, _P, _P, _L, _L, _L, _L, _P, _L, _L, _L, _L]),
    "mh_attention": (
        _L,
        [*[_I] * 3, _P, _P, _L, _L, _P, _P, *[_L] * 4, *[_P] * 3, *[_L] * 3, _F, _L, _F],
    ),
    "mh_unpack4": (None, [_I, _P, _P, _P, _P, _L, _L, _L]),
    "mh_matmul": (_L, [_I, _I, _P, _L, _P, _L, _L, _L]),
    "mh_project": (_L, [_I, _I, _P, _P, _L, _P, _L, _L, _L, _P, _P, _P, _L]),
    "mh_amx": (_I, []),
}


class NativeBackend(NativeParts, NativeDense, NativeStack):
    """C kernels on the CPU; see :class:`manyhats_kernels.backend.Backend`.

    Everything is summed in fp32 and rounded once, and a token's result has the same bits whoever
    shares the batch; only attention of long prompts (more than :data:`PREFILL_QUERIES` new tokens),
    on AMX tiles or by PyTorch, rounds its probabilities to the storage type as PyTorch does. Calls
    release the GIL and run on ``torch.get_num_threads()`` threads of the OpenMP pool that PyTorch
    uses.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the entry points of a library that ``native.build.load`` gave."""
        for name, (result, arguments) in _SIGNATURES.items():
            entry = getattr(library, name)
            entry.restype, entry.argtypes = result, arguments
        self._lora_add = library.mh_lora_add
        self._bias_add = library.mh_bias_add
        self._store_kv = library.mh_store_kv
        self._attention = library.mh_attention
        self._unpack4 = library.mh_unpack4
        self._matmul = library.mh_matmul
        self._project = library.mh_project
        self._amx = library.mh_amx()
        NativeParts.__init__(self, library)
        NativeDense.__init__(self, library)
        NativeStack.__init__(self, library)

    @classmethod
    def load(cls, cache_dir: Path) -> NativeBackend:
        """Load the kernels from ``cache_dir``, compiled with the ``cc`` on PATH where need be.

        Raises BackendUnavailableError, with the reason, where that cannot be done.
        """
        return cls(load(build(shutil.which("cc"), cache_dir)))

    def lora_add(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: SiteRows, batch: AdapterBatch
    ) -> None:
        """See :meth:`Backend.lora_add`: a group of one."""
        check_lora(y, x, a, b, rows, batch)
        self.lora_add_group([y], x, SiteGroup([SiteWeights(a, b, rows)]), batch)

    def lora_add_group(
        self, ys: Sequence[Tensor], x: Tensor, group: SiteGroup, batch: AdapterBatch
    ) -> None:
        """See :meth:`Backend.lora_add_group`: one call, one parallel region.

        Segments of every length take the same way: for a rank of 16 a pair of bf16 GEMMs is no
        quicker at 512 tokens and would round the product in between. (At rank 64 it is, by two to
        three times.)
        """
        segments = batch.segments
        if not segments:
            return
        group.check(ys, x, batch.num_tokens, batch.num_slots)
        fields = group.descriptor_for(ys)
        order, slots, offsets = batch.pointers
        failed = self._lora_add(
            DTYPE_CODES[x.dtype],
            self._amx,
            torch.get_num_threads(),
            fields,
            len(ys),
            x.data_ptr(),
            x.stride(0),
            group.in_features,
            order,
            slots,
            offsets,
            len(segments),
        )
        _check_segments(failed, group, batch)

    def bias_add(self, y: Tensor, bias: Tensor, batch: AdapterBatch) -> None:
        """See :meth:`Backend.bias_add`."""
        if not batch.segments:
            return
        check_bias(y, bias, batch)
        if y.stride(1) != 1 or bias.stride(1) != 1:
            raise ValueError("the last dimension of y and bias must be contiguous")
        self._bias_add(
            DTYPE_CODES[y.dtype],
            torch.get_num_threads(),
            y.data_ptr(),
            y.stride(0),
            bias.data_ptr(),
            bias.stride(0),
            y.size(1),
            batch.pointers[0],
            batch.slots.data_ptr(),
            batch.segments[-1][2],
        )

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """``[num_blocks, kv_heads, block_size, head_dim]``: a head's run in a block is whole."""
        return (num_blocks, kv_heads, block_size, head_dim)

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
    ) -> None:
        """See :meth:`Backend.store_kv`."""
        check_store(k, v, k_cache, v_cache, batch)
        k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (k, v))
        self._store_kv(
            k.element_size(),
            torch.get_num_threads(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            batch.pointers[3],
            batch.num_tokens,
            k.size(1),
            k.size(2),
            batch.block_size,
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
        """See :meth:`Backend.paged_attention`.

        Sequences with few new tokens read the cache where it lies; for the others the context is
        gathered once, and multiplied on AMX tiles where it is bf16 and the machine has them, else
        by PyTorch's attention.
        """
        check_attention(q, k_cache, v_cache, batch, sliding_window, soft_cap)
        out = torch.empty(q.shape, dtype=q.dtype)
        native = q.size(2) <= MAX_HEAD_DIM
        in_place = PREFILL_QUERIES if native else 0
        tiles = native and q.dtype == torch.bfloat16 and bool(self._amx)
        q = q if q.stride(2) == 1 else q.contiguous()
        query_start, context_lens, tables, _ = batch.pointers
        failed = self._attention(
            DTYPE_CODES[q.dtype],
            tiles,
            torch.get_num_threads(),
            out.data_ptr(),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            q.size(1),
            k_cache.size(1),
            q.size(2),
            batch.block_size,
            query_start,
            context_lens,
            tables,
            batch.block_tables.size(1),
            batch.num_sequences,
            in_place,
            scale,
            sliding_window or 0,
            soft_cap or 0.0,
        )
        check_memory(failed)
        if batch.max_query_len > in_place and not tiles:
            for sequence, queries in enumerate(batch.host_query_lens):
                if queries > in_place:
                    attend_sequence(
                        out, q, k_cache, v_cache, batch, sequence, scale, sliding_window, soft_cap
                    )
        return out

    def dequantize_4bit(self, weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
        """See :meth:`FourBit.dequantize_4bit`; bf16 is unpacked in C, the rest by PyTorch."""
        if dtype != torch.bfloat16 or not _in_runs(weight):
            return reference_4bit.dequantize_4bit(weight, dtype)
        out = torch.empty(weight.shape, dtype=dtype)
        self._unpack4(
            torch.get_num_threads(),
            out.data_ptr(),
            weight.packed.data_ptr(),
            weight.absmax.data_ptr(),
            weight.code.data_ptr(),
            *weight.shape,
            weight.blocksize,
        )
        return out

    def matmul_4bit(self, x: Tensor, weight: FourBitWeight, bias: Tensor | None = None) -> Tensor:
        """See :meth:`FourBit.matmul_4bit`.

        What :meth:`takes` takes is read at 4 bits, on AMX tiles where the machine has them.
        Whatever else is dequantized and multiplied by PyTorch; so are more than :data:`DOTS_ROWS`
        rows on a machine without AMX.
        """
        check_matmul_4bit(x, weight, bias)
        here = x.dtype == torch.bfloat16 and self.takes(weight)
        if not here or not (self._amx or x.shape[0] <= DOTS_ROWS):
            return functional.linear(x, self.dequantize_4bit(weight, x.dtype), bias)
        return self.matmul_group(x, MatrixGroup([weight], [bias]))[0]

    def takes(self, weight: FourBitWeight | DenseWeight) -> bool:
        """4 bits with plain scales, none shared by two rows or half a run; bf16 on AMX alone."""
        if isinstance(weight, DenseWeight):
            return bool(self._amx) and weight.shape[1] % 64 == 0 and weight.weight.is_cpu
        return _in_runs(weight)

    def matmul_group(self, x: Tensor, group: MatrixGroup) -> list[Tensor]:
        """See :meth:`GroupedMatmul.matmul_group`: one call, one parallel region."""
        _check_products(x, group)
        if not self._amx and x.shape[0] > DOTS_ROWS:
            return [
                functional.linear(x, self.dequantize_4bit(w, x.dtype), bias)
                for w, bias in zip(group.weights, group.biases, strict=True)
                if isinstance(w, FourBitWeight)
            ]
        ys = group.outputs(x.shape[0])
        if x.shape[0]:
            failed = self._matmul(
                torch.get_num_threads(),
                self._amx,
                group.descriptor_for(ys),
                len(ys),
                x.data_ptr(),
                x.stride(0),
                *x.shape,
            )
            check_memory(failed)
        return ys

    def matmul_lora_group(
        self, x: Tensor, group: MatrixGroup, sites: SiteGroup, batch: AdapterBatch
    ) -> list[Tensor]:
        """See :meth:`GroupedMatmul.matmul_lora_group`.

        On AMX tiles the low-rank product of a segment of 32 tokens or more is summed with the
        base's before either is rounded; in all else the bits are those of :meth:`matmul_group` and
        then :meth:`lora_add_group`.
        """
        if not self._amx or not batch.segments:
            ys = self.matmul_group(x, group)
            self.lora_add_group(ys, x, sites, batch)
            return ys
        _check_products(x, group)
        ys = group.outputs(x.shape[0])
        sites.check(ys, x, batch.num_tokens, batch.num_slots)
        failed = self._project(
            torch.get_num_threads(),
            self._amx,
            group.descriptor_for(ys),
            sites.descriptor_for(ys),
            len(ys),
            x.data_ptr(),
            x.stride(0),
            *x.shape,
            *batch.pointers,
            len(batch.segments),
        )
        _check_segments(failed, sites, batch)
        return ys


def _check_products(x: Tensor, group: MatrixGroup) -> None:
    if (
        x.dtype != torch.bfloat16
        or x.ndim != 2
        or x.shape[1] != group.in_features
        or (x.shape[1] > 1 and x.stride(1) != 1)
    ):
        raise ValueError(
            f"x must be [T, {group.in_features}] of bf16 with contiguous rows, got "
            f"{tuple(x.shape)} {x.dtype}"
        )


def _check_segments(failed: int, group: SiteGroup, batch: AdapterBatch) -> None:
    """Raises what an entry point of low-rank products reported, where it did."""
    if not failed:
        return
    check_memory(failed)
    site, segment = divmod(failed - 1, len(batch.segments))
    slot, weights = batch.worn[segment], group.sites[site]
    rows = weights.rows
    check_run(slot, int(rows.start[slot]), int(rows.count[slot]), weights.a.shape[0])


def _in_runs(weight: FourBitWeight) -> bool:
    """Whether the C code takes the weight: plain scales, none shared by two rows or half a run."""
    return (
        weight.nested is None
        and weight.blocksize % 64 == 0
        and weight.shape[1] % weight.blocksize == 0
        and weight.packed.device.type == "cpu"
    )
