"""4-bit weights as bitsandbytes stores them for a GPU, and the products that a backend offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from manyhats_kernels.backend import DTYPES, SiteRows
from manyhats_kernels.batch import AdapterBatch
from manyhats_kernels.static_batch import StaticAdapterBatch

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Double quantization: scale ``i`` is ``code[absmax[i]] * scale[i // blocksize] + offset``.

    ``absmax`` itself is the uint8 vector of :class:`FourBitWeight`.
    """

    code: Tensor  # fp32 [256]
    scale: Tensor  # fp32 [ceil(blocks / blocksize)]
    offset: Tensor  # fp32, one value
    blocksize: int


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """A ``[N, K]`` matrix in NF4 or FP4, flattened row by row and cut into runs of ``blocksize``.

    Value ``e`` of the flat matrix is ``code[nibble(e)] * absmax[e // blocksize]``; even values lie
    in the high nibbles of ``packed``, odd ones in the low. The last run, and the last byte, may be
    part-filled. Anything that does not fit raises ValueError.
    """

    packed: Tensor  # uint8, ceil(N * K / 2) bytes, contiguous, of any shape
    shape: tuple[int, int]
    blocksize: int
    code: Tensor  # fp32 [16]
    absmax: Tensor  # fp32 [ceil(N * K / blocksize)], uint8 with double quantization
    nested: NestedScales | None = None

    def __post_init__(self) -> None:
        n, k = self.shape
        if n < 1 or k < 1 or self.blocksize not in BLOCK_SIZES:
            raise ValueError(f"shape {n} x {k} or blocksize {self.blocksize} is not legal")
        blocks = -(-n * k // self.blocksize)
        vectors = [("code", self.code, torch.float32, 16)]
        if self.nested is None:
            vectors.append(("absmax", self.absmax, torch.float32, blocks))
        else:
            if self.nested.blocksize < 1:
                raise ValueError(f"nested blocksize must be >= 1, got {self.nested.blocksize}")
            outer = -(-blocks // self.nested.blocksize)
            vectors += [
                ("absmax", self.absmax, torch.uint8, blocks),
                ("nested code", self.nested.code, torch.float32, 256),
                ("nested scale", self.nested.scale, torch.float32, outer),
                ("nested offset", self.nested.offset, torch.float32, 1),
            ]
        vectors.append(("packed", self.packed, torch.uint8, -(-n * k // 2)))
        for name, tensor, dtype, size in vectors:
            if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be {size} contiguous values of {dtype}, got "
                    f"{tensor.numel()} of {tensor.dtype}"
                )


@dataclass(frozen=True, eq=False)
class Expand:
    """The second half of the adapters' products, to be added to a matrix product's output.

    ``y[t] += shrunk[:, t, :count].sum(0) @ b[start:start + count]`` with the run of slot
    ``batch.slots[t]``; tokens of the base take nothing. ``shrunk`` is fp32 ``[parts, T, width]``,
    contiguous, in the batch's order of tokens, ``width`` at least the largest count of a worn slot;
    ``b`` is ``[R, N]`` of x's dtype, its last dimension contiguous. A token whose slot's run is
    outside ``b`` or wider than ``width`` becomes NaN on a GPU: the run is read there.
    """

    shrunk: Tensor
    b: Tensor
    rows: SiteRows
    batch: AdapterBatch | StaticAdapterBatch


@runtime_checkable
class FourBit(Protocol):
    """A backend whose matrix product reads 4-bit weights as they lie."""

    def dequantize_4bit(self, weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
        """The matrix as ``[N, K]`` of ``dtype``: products in fp32, rounded once."""

    def matmul_4bit(
        self,
        x: Tensor,
        weight: FourBitWeight,
        bias: Tensor | None = None,
    ) -> Tensor:
        """``x @ W.T + bias``.

        ``x`` is ``[T, K]`` of bf16, fp16 or fp32, its last dimension contiguous; ``W`` is
        ``dequantize_4bit(weight, x.dtype)``; ``bias`` is ``[N]`` of x's dtype. Sums are fp32,
        rounded once. Returns ``[T, N]`` of x's dtype, contiguous. Raises ValueError on shapes or
        dtypes that do not fit.
        """


def check_matmul_4bit(
    x: Tensor, weight: FourBitWeight, bias: Tensor | None, expand: Expand | None = None
) -> None:
    """Raise ValueError, naming what is wrong, unless the arguments fit ``FourBit.matmul_4bit``."""
    n, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k or x.dtype not in DTYPES:
        raise ValueError(f"x must be [T, {k}] of {DTYPES}, got {tuple(x.shape)} {x.dtype}")
    if k > 1 and x.stride(1) != 1:
        raise ValueError("the last dimension of x must be contiguous")
    if bias is not None and (
        bias.shape != (n,) or bias.dtype != x.dtype or not bias.is_contiguous()
    ):
        raise ValueError(
            f"bias must be [{n}] of {x.dtype}, contiguous, got {tuple(bias.shape)} {bias.dtype}"
        )
    if expand is not None:
        _check_expand(x, n, expand)


def _check_expand(x: Tensor, n: int, expand: Expand) -> None:
    shrunk, b, batch = expand.shrunk, expand.b, expand.batch
    tokens = x.shape[0]
    if shrunk.ndim != 3 or shrunk.shape[1] != tokens or shrunk.dtype != torch.float32:
        raise ValueError(
            f"shrunk must be float32 [parts, {tokens}, width], got {tuple(shrunk.shape)} "
            f"{shrunk.dtype}"
        )
    if b.ndim != 2 or b.shape[1] != n or b.dtype != x.dtype:
        raise ValueError(f"b must be [rows, {n}] of {x.dtype}, got {tuple(b.shape)} {b.dtype}")
    if not shrunk.is_contiguous() or (n > 1 and b.stride(1) != 1):
        raise ValueError("shrunk, and the last dimension of b, must be contiguous")
    if batch.num_tokens != tokens or expand.rows.num_slots < batch.num_slots:
        raise ValueError(
            f"the plan has {batch.num_tokens} tokens and {batch.num_slots} slots, x "
            f"{tokens} rows, and rows cover {expand.rows.num_slots} slots"
        )
