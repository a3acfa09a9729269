"""The launchers of the C kernels for parts other than the low-rank product."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from manyhats_kernels.backend import (
    SiteRows,
    check_bias,
    check_bottleneck,
    check_lora,
    check_norm,
    check_run,
)
from manyhats_kernels.batch import AdapterBatch

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

PREFILL_QUERIES = 32
"""New tokens above which a sequence's context is gathered before it is attended to."""

_P, _L, _I, _F = c_void_p, c_int64, c_int, c_float
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "mh_scale_rows": (None, [_I, _I, _P, _L, _P, _L, _L, _P, _P, _L]),
    "mh_norm_rows": (None, [_I, _I, _P, _L, _P, _L, _P, _L, _P, _P, _L, _F, _I, _P, _P, _L]),
    "mh_bottleneck_add": (
        _L,
        [_I, _I, _I, _P, _L, _P, _L, _P, _L, _P, _L, _P, _L, _L, _L, *[_P] * 7, _L],
    ),
}


class NativeParts:
    """Scales, gains and bottlenecks in C; see :class:`manyhats_kernels.backend.Backend`.

    As with the rest, a token's result has the same bits whoever shares the batch.
    """

    _amx: int

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the entry points of a library that ``native.build.load`` gave."""
        for name, (result, arguments) in _SIGNATURES.items():
            entry = getattr(library, name)
            entry.restype, entry.argtypes = result, arguments
        self._scale_rows = library.mh_scale_rows
        self._norm_rows = library.mh_norm_rows
        self._bottleneck_add = library.mh_bottleneck_add

    def scale_rows(self, y: Tensor, scale: Tensor, batch: AdapterBatch) -> None:
        """See :meth:`Backend.scale_rows`."""
        if not batch.segments:
            return
        check_bias(y, scale, batch, "scale")
        _check_rows(y, scale)
        self._scale_rows(
            DTYPE_CODES[y.dtype],
            torch.get_num_threads(),
            y.data_ptr(),
            y.stride(0),
            scale.data_ptr(),
            scale.stride(0),
            y.size(1),
            batch.pointers[0],
            batch.slots.data_ptr(),
            batch.segments[-1][2],
        )

    def norm_rows(
        self,
        y: Tensor,
        x: Tensor,
        gain: Tensor,
        has: Tensor,
        shift: Tensor | None,
        batch: AdapterBatch,
        *,
        eps: float,
        centered: bool,
    ) -> None:
        """See :meth:`Backend.norm_rows`."""
        if not batch.segments:
            return
        check_norm(y, x, gain, has, shift, batch)
        _check_rows(y, x, gain)
        self._norm_rows(
            DTYPE_CODES[y.dtype],
            torch.get_num_threads(),
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.stride(0),
            gain.data_ptr(),
            gain.stride(0),
            has.data_ptr(),
            shift.data_ptr() if shift is not None else None,
            y.size(1),
            eps,
            centered,
            batch.pointers[0],
            batch.slots.data_ptr(),
            batch.segments[-1][2],
        )

    def bottleneck_add(
        self,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor,
        kinds: Tensor,
        rows: SiteRows,
        batch: AdapterBatch,
    ) -> None:
        """See :meth:`Backend.bottleneck_add`: one call, one parallel region."""
        if not batch.segments:
            return
        check_lora(y, x, down, up, rows, batch)
        check_bottleneck(down, down_bias, kinds, batch)
        failed = self._bottleneck_add(
            DTYPE_CODES[x.dtype],
            self._amx,
            torch.get_num_threads(),
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.stride(0),
            down.data_ptr(),
            down.stride(0),
            up.data_ptr(),
            up.stride(0),
            down_bias.data_ptr(),
            x.size(1),
            y.size(1),
            down.size(0),
            *rows.pointers,
            kinds.data_ptr(),
            batch.slots.data_ptr(),
            *batch.pointers,
            len(batch.segments),
        )
        if failed:
            check_memory(failed)
            slot = batch.worn[failed - 1]
            check_run(slot, int(rows.start[slot]), int(rows.count[slot]), down.shape[0])


def check_memory(failed: int) -> None:
    """Raise MemoryError where a kernel returned that it had none."""
    if failed == -1:
        raise MemoryError("the native kernels could not allocate their scratch memory")


def _check_rows(*tensors: Tensor) -> None:
    if any(t.stride(1) != 1 for t in tensors):
        raise ValueError("the last dimension of every tensor must be contiguous")
