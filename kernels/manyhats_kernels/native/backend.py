"""The launchers of the C kernels."""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from manyhats_kernels.backend import (
    SiteRows,
    check_attention,
    check_bias,
    check_lora,
    check_run,
    check_store,
    check_unpack4,
)
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.cpu import attend_sequence
from manyhats_kernels.native.build import build, load
from manyhats_kernels.native.parts import DTYPE_CODES, NativeParts, check_memory

MAX_HEAD_DIM = 256

PREFILL_QUERIES = 32
"""New tokens above which a sequence is gathered and attended to by PyTorch's blocked attention."""

_P, _L, _I, _F = c_void_p, c_int64, c_int, c_float
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "mh_lora_add": (_L, [_I, _I, _P, _L, _P, _L, _P, _L, _P, _L, _L, _L, _L, *[_P] * 5, _L]),
    "mh_bias_add": (None, [_I, _I, _P, _L, _P, _L, _L, _P, _P, _L]),
    "mh_store_kv": (None, [_L, _I, _P, _P, _P, _P, _L, _L, _L, _L, _P, _L, _L, _L, _L]),
    "mh_attention": (
        _L,
        [_I, _I, _P, _P, _L, _L, _P, _P, _L, _L, _L, _L, _P, _P, _P, _L, _L, _L, _F, _L, _F],
    ),
    "mh_unpack4": (None, [_I, _P, _P, _P, _P, _L, _L, _L]),
}


class NativeBackend(NativeParts):
    """C kernels on the CPU; see :class:`manyhats_kernels.backend.Backend`.

    Everything is summed in fp32 and rounded once, and a token's result has the same bits whoever
    shares the batch; only attention of long prompts (more than :data:`PREFILL_QUERIES` new tokens),
    which PyTorch does, rounds its probabilities to the storage type as PyTorch does. Calls release
    the GIL and run on ``torch.get_num_threads()`` threads of the OpenMP pool that PyTorch uses.
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
        super().__init__(library)

    @classmethod
    def load(cls, cache_dir: Path) -> NativeBackend:
        """Load the kernels from ``cache_dir``, compiled with the ``cc`` on PATH where need be.

        Raises BackendUnavailableError, with the reason, where that cannot be done.
        """
        return cls(load(build(shutil.which("cc"), cache_dir)))

    def lora_add(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: SiteRows, batch: AdapterBatch
    ) -> None:
        """See :meth:`Backend.lora_add`: one call, one parallel region.

        Segments of every length take the same way: for a rank of 16 a pair of bf16 GEMMs is no
        quicker at 512 tokens and would round the product in between. (At rank 64 it is, by two to
        three times.)
        """
        segments = batch.segments
        if not segments:
            return
        dtype, tokens = x.dtype, batch.num_tokens
        x_shape, y_shape, a_shape, b_shape = x.shape, y.shape, a.shape, b.shape
        x_step, y_step, a_step, b_step = x.stride(), y.stride(), a.stride(), b.stride()
        start, count, order, slots, offsets = *rows.pointers, *batch.pointers
        # the usual case, checked cheaply: this runs for every projection of every layer
        if not (
            dtype in DTYPE_CODES
            and dtype is y.dtype is a.dtype is b.dtype
            and len(a_shape) == 2 == len(b_shape)
            and a_shape[0] == b_shape[0]
            and x_shape == (tokens, a_shape[1])
            and y_shape == (tokens, b_shape[1])
            and x_step[1] == y_step[1] == a_step[1] == b_step[1] == 1
            and rows.num_slots >= batch.num_slots
        ):
            check_lora(y, x, a, b, rows, batch)
        failed = self._lora_add(
            DTYPE_CODES[dtype],
            torch.get_num_threads(),
            y.data_ptr(),
            y_step[0],
            x.data_ptr(),
            x_step[0],
            a.data_ptr(),
            a_step[0],
            b.data_ptr(),
            b_step[0],
            x_shape[1],
            y_shape[1],
            a_shape[0],
            start,
            count,
            order,
            slots,
            offsets,
            len(segments),
        )
        if failed:
            check_memory(failed)
            slot = batch.worn[failed - 1]
            check_run(slot, int(rows.start[slot]), int(rows.count[slot]), a.shape[0])

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
        gathered once and PyTorch's attention does the rest.
        """
        check_attention(q, k_cache, v_cache, batch, sliding_window, soft_cap)
        out = torch.empty(q.shape, dtype=q.dtype)
        in_place = PREFILL_QUERIES if q.size(2) <= MAX_HEAD_DIM else 0
        q = q if q.stride(2) == 1 else q.contiguous()
        query_start, context_lens, tables, _ = batch.pointers
        failed = self._attention(
            DTYPE_CODES[q.dtype],
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
        if batch.max_query_len > in_place:
            for sequence, queries in enumerate(batch.host_query_lens):
                if queries > in_place:
                    attend_sequence(
                        out, q, k_cache, v_cache, batch, sequence, scale, sliding_window, soft_cap
                    )
        return out

    def unpack4(self, out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor) -> None:
        """See :meth:`manyhats_kernels.backend.Unpacker.unpack4`."""
        check_unpack4(out, packed, absmax, code)
        self._unpack4(
            torch.get_num_threads(),
            out.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            code.data_ptr(),
            out.size(0),
            out.size(1),
            out.size(1) // absmax.size(0),
        )
