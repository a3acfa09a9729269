"""What adapters do in the layers of a stack beside low-rank products, for a backend that runs them
in the same call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats_kernels.backend import SiteRows

ROUND_PARALLEL = 1
"""Flag of a bottleneck that reads the stream before the block."""

ROUND_OF_OUTPUT = 2
"""Flag of a bottleneck that reads the block's output."""

ROUND_ALONE = 4
"""Flag of a bottleneck whose output stands in for the stream."""


@dataclass(frozen=True, eq=False)
class VectorRows:
    """One vector a slot, ``values`` [slots, n] of bf16; ``has`` [slots], int32, is 0 for a slot
    without one.
    """

    values: Tensor
    has: Tensor


@dataclass(frozen=True, eq=False)
class LinearParts:
    """Factors of a linear layer's input and output, and terms of its output."""

    input: VectorRows | None
    output: VectorRows | None
    bias: VectorRows | None


@dataclass(frozen=True, eq=False)
class NormParts:
    """Gains that stand in for a norm's weight, and terms of its output."""

    gain: VectorRows | None
    bias: VectorRows | None


@dataclass(frozen=True, eq=False)
class BottleneckRound:
    """One bottleneck a slot, as ``Backend.bottleneck_add`` takes them.

    ``down`` and ``up`` [rows, hidden], bf16; ``bias`` [rows], fp32; ``kinds`` and ``flags``
    [slots], int32: what it reads (``ROUND_PARALLEL``, ``ROUND_OF_OUTPUT``, else the stream with the
    block's output) and ``ROUND_ALONE``.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    rows: SiteRows
    kinds: Tensor
    flags: Tensor


@dataclass(frozen=True, eq=False)
class LayerParts:
    """One layer's. ``linear``: q, k, v, o, gate, up, down, of which o and down alone may have
    factors of the input; ``norms``: before attention, before the mlp; ``attention`` and ``mlp``:
    bottlenecks of what the blocks add to the stream, in the order in which they run.
    """

    linear: tuple[LinearParts, ...]
    norms: tuple[NormParts, NormParts]
    attention: Sequence[BottleneckRound]
    mlp: Sequence[BottleneckRound]


class StackParts:
    """The parts of all layers; ``descriptor`` is what native code reads.

    ``outs``: inputs and outputs of the seven linear layers, to check against. Raises ValueError,
    naming what is wrong, where a pool does not fit.
    """

    def __init__(
        self, layers: Sequence[LayerParts], widths: Sequence[tuple[int, int]], slots: int
    ) -> None:
        self.layers = tuple(layers)
        self._slots = slots
        self._rounds: list[ctypes.Array[ctypes.c_int64]] = []
        hidden = widths[0][0]
        fields: list[int] = []
        for number, layer in enumerate(self.layers):
            at = f"layer {number}"
            for index, ((inputs, outputs), own) in enumerate(
                zip(widths, layer.linear, strict=True)
            ):
                if own.input is not None and index not in (3, 6):
                    raise ValueError(f"{at}: linear layer {index} shares its input with others")
                fields += self._vectors(f"{at}: input of {index}", own.input, inputs)
                fields += self._vectors(f"{at}: output of {index}", own.output, outputs)
                fields += self._vectors(f"{at}: bias of {index}", own.bias, outputs)
            for norm in layer.norms:
                fields += self._vectors(f"{at}: gain", norm.gain, hidden)
                fields += self._vectors(f"{at}: bias of a norm", norm.bias, hidden)
            blocks = (layer.attention, layer.mlp)
            fields += [self._block(at, rounds, hidden) for rounds in blocks]
            fields += [len(rounds) for rounds in blocks]
        self.descriptor = (ctypes.c_int64 * len(fields))(*fields)

    def _vectors(self, what: str, own: VectorRows | None, size: int) -> tuple[int, int]:
        if own is None:
            return 0, 0
        _check(what, own.values, (self._slots, size), torch.bfloat16)
        _check(what, own.has, (self._slots,), torch.int32)
        return own.values.data_ptr(), own.has.data_ptr()

    def _block(self, at: str, rounds: Sequence[BottleneckRound], hidden: int) -> int:
        fields: list[int] = []
        for own in rounds:
            pool = len(own.down)
            _check(f"{at}: down", own.down, (pool, hidden), torch.bfloat16)
            _check(f"{at}: up", own.up, (pool, hidden), torch.bfloat16)
            _check(f"{at}: bias of a bottleneck", own.bias, (pool,), torch.float32)
            for name, tensor in (("kinds", own.kinds), ("flags", own.flags)):
                _check(f"{at}: {name}", tensor, (self._slots,), torch.int32)
            pointers = (own.down.data_ptr(), own.up.data_ptr(), own.bias.data_ptr())
            fields += [*pointers, pool, *own.rows.pointers]
            fields += [own.kinds.data_ptr(), own.flags.data_ptr()]
        if not fields:
            return 0
        self._rounds.append((ctypes.c_int64 * len(fields))(*fields))
        return ctypes.addressof(self._rounds[-1])


def _check(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{what} must be {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
        )
    if not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{what} must be contiguous and on the CPU")
