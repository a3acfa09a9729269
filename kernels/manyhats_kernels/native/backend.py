"""The launchers of the C kernels."""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from manyhats_kernels.backend import (
    check_attention,
    check_bias,
    check_store,
)
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.cpu import attend_sequence
from manyhats_kernels.native.build import build, load
from manyhats_kernels.native.dense import NativeDense
from manyhats_kernels.native.parts import (
    DTYPE_CODES,
    PREFILL_QUERIES,
    NativeParts,
    check_memory,
)
from manyhats_kernels.native.products import NativeProducts
from manyhats_kernels.native.stack import NativeStack
from manyhats_kernels.stack import MAX_HEAD_DIM

_P, _L, _I, _F = c_void_p, c_int64, c_int, c_float
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "mh_bias_add": (None, [_I, _I, _P, _L, _P, _L, _L, _P, _P, _L]),
    "mh_store_kv": (None, [_L, _I, _P, _P, _P, _P, _L, _L, _L, _L, _P, _L, _L, _L, _L]),
    "mh_attention": (
        _L,
        [*[_I] * 3, _P, _P, _L, _L, _P, _P, *[_L] * 4, *[_P] * 3, *[_L] * 3, _F, _L, _F],
    ),
    "mh_amx": (_I, []),
}


class NativeBackend(NativeProducts, NativeParts, NativeDense, NativeStack):
    """C kernels on the CPU; see :class:`manyhats_kernels.backend.Backend`.

    Everything is summed in fp32 and rounded once, and a token's result has the same bits whoever
    shares the batch, but for what :meth:`matmul_lora_group` says. Attention of long prompts (more
    than :data:`PREFILL_QUERIES` new tokens), on AMX tiles or by PyTorch, rounds its probabilities
    to the storage type as PyTorch does. Calls release the GIL and run on
    ``torch.get_num_threads()`` threads of the OpenMP pool that PyTorch uses.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the entry points of a library that ``native.build.load`` gave."""
        for name, (result, arguments) in _SIGNATURES.items():
            entry = getattr(library, name)
            entry.restype, entry.argtypes = result, arguments
        self._bias_add = library.mh_bias_add
        self._store_kv = library.mh_store_kv
        self._attention = library.mh_attention
        self._amx = library.mh_amx()
        NativeProducts.__init__(self, library)
        NativeParts.__init__(self, library)
        NativeDense.__init__(self, library)
        NativeStack.__init__(self, library)

    @classmethod
    def load(cls, cache_dir: Path) -> NativeBackend:
        """Load the kernels from ``cache_dir``, compiled with the ``cc`` on PATH where need be.

        Raises BackendUnavailableError, with the reason, where that cannot be done.
        """
        return cls(load(build(shutil.which("cc"), cache_dir)))

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
