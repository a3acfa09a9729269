"""The launchers of the C versions of ``manyhats_kernels.dense``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from manyhats_kernels.dense import check_rms_norm, check_silu_mul
from manyhats_kernels.native.parts import DTYPE_CODES

_P, _L, _I, _F = c_void_p, c_int64, c_int, c_float


class NativeDense:
    """Norm and gated activation in C; a token's result has the same bits whoever is beside it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the entry points of a library that ``native.build.load`` gave."""
        self._rms_norm = library.mh_rms_norm
        self._rms_norm.restype, self._rms_norm.argtypes = None, [_I, _I, _P, _P, _L, _P, _L, _F, _L]
        self._silu_mul = library.mh_silu_mul
        self._silu_mul.restype, self._silu_mul.argtypes = None, [_I, _I, _P, _P, _L, _P, _L, _L, _L]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :func:`manyhats_kernels.dense.rms_norm`."""
        check_rms_norm(x, weight)
        y = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
            y.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            x.size(1),
            eps,
            x.size(0),
        )
        return y

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """See :func:`manyhats_kernels.dense.silu_mul`."""
        check_silu_mul(gate, up)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        self._silu_mul(
            DTYPE_CODES[gate.dtype],
            torch.get_num_threads(),
            y.data_ptr(),
            gate.data_ptr(),
            gate.stride(0),
            up.data_ptr(),
            up.stride(0),
            gate.size(1),
            gate.size(0),
        )
        return y
