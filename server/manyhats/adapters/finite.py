"""Whether floats are finite, by their bits: one pass of integer maxima, many times quicker than
``torch.isfinite``.

The bits of an IEEE 754 float without its sign grow with its magnitude, and infinity, then the NaNs,
come after every finite value. So the largest of the positive ones is the largest signed integer
among them, and the largest of the negative ones the largest unsigned integer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class _Bits:
    """A float as integers; ``infinity``: the bits of +infinity."""

    as_torch: torch.dtype
    signed: np.dtype[Any]
    unsigned: np.dtype[Any]
    infinity: int


def _bits(size: int, infinity: int) -> _Bits:
    signed = {2: torch.int16, 4: torch.int32}[size]
    return _Bits(signed, np.dtype(f"<i{size}"), np.dtype(f"<u{size}"), infinity)


_BITS: Final[Mapping[torch.dtype, _Bits]] = {
    torch.float32: _bits(4, 0x7F80_0000),
    torch.float16: _bits(2, 0x7C00),
    torch.bfloat16: _bits(2, 0x7F80),
}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a CPU tensor (float32, float16 or bfloat16) is NaN or infinite."""
    bits = _BITS[tensor.dtype]
    return _finite(tensor.detach().view(bits.as_torch).numpy(), bits)


def finite_bytes(data: bytearray | memoryview, begin: int, end: int, dtype: torch.dtype) -> bool:
    """The same of the values that lie, little endian, from byte ``begin`` to ``end``, at any
    alignment.
    """
    bits = _BITS[dtype]
    count = (end - begin) // dtype.itemsize
    return _finite(np.frombuffer(data, bits.signed, count=count, offset=begin), bits)


def _finite(values: np.ndarray[Any, np.dtype[Any]], bits: _Bits) -> bool:
    if not values.size:
        return True
    sign = 1 << (8 * bits.signed.itemsize - 1)
    return bool(
        values.max() < bits.infinity and values.view(bits.unsigned).max() < sign | bits.infinity
    )
