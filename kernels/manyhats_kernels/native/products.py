"""The launchers of the base's products, with 4-bit and bf16 weights, and the adapters'."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn import functional

from manyhats_kernels import reference_4bit
from manyhats_kernels.backend import SiteRows, check_lora, check_run
from manyhats_kernels.batch import AdapterBatch
from manyhats_kernels.fourbit import FourBitWeight, check_matmul_4bit
from manyhats_kernels.groups import DenseWeight, MatrixGroup, SiteGroup, SiteWeights
from manyhats_kernels.native.parts import DTYPE_CODES, check_memory

DOTS_ROWS = 64
"""Rows up to which the product with 4-bit weights by dot products beats unpacking and oneDNN."""

_P, _L, _I = c_void_p, c_int64, c_int
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "mh_lora_add": (_L, [_I, _I, _I, _P, _L, _P, _L, _L, _P, _P, _P, _L]),
    "mh_unpack4": (None, [_I, _P, _P, _P, _P, _L, _L, _L]),
    "mh_matmul": (_L, [_I, _I, _P, _L, _P, _L, _L, _L]),
    "mh_project": (_L, [_I, _I, _P, _P, _L, _P, _L, _L, _L, _P, _P, _P, _L]),
}


class NativeProducts:
    """The base's products, the adapters' low-rank ones, and both together.

    Sums are fp32; a token's result has the same bits whoever shares the batch, but for what
    :meth:`matmul_lora_group` says.
    """

    _amx: int

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the entry points of a library that ``native.build.load`` gave."""
        for name, (result, arguments) in _SIGNATURES.items():
            entry = getattr(library, name)
            entry.restype, entry.argtypes = result, arguments
        self._lora_add = library.mh_lora_add
        self._unpack4 = library.mh_unpack4
        self._matmul = library.mh_matmul
        self._project = library.mh_project

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
