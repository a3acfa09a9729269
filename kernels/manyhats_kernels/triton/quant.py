"""Launchers of the 4-bit kernels, and which form a product takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from manyhats_kernels.fourbit import Expand, FourBitWeight, check_matmul_4bit
from manyhats_kernels.static_batch import any_worn
from manyhats_kernels.triton import quant_kernels as kernels


@dataclass(frozen=True)
class MatmulTile:
    """Tile of the product of ``bits``-wide values for up to ``tokens`` tokens.

    ``block_k`` is halved until it divides K.
    """

    bits: int
    tokens: int
    block_t: int
    block_n: int
    block_k: int
    warps: int
    stages: int


MATMUL_TILES = (
    MatmulTile(bits=16, tokens=16, block_t=16, block_n=64, block_k=128, warps=4, stages=3),
    MatmulTile(bits=16, tokens=32, block_t=32, block_n=64, block_k=128, warps=4, stages=3),
    MatmulTile(bits=16, tokens=1 << 62, block_t=64, block_n=64, block_k=64, warps=4, stages=3),
    MatmulTile(bits=32, tokens=1 << 62, block_t=16, block_n=64, block_k=64, warps=4, stages=2),
)
"""In ascending order; the first that fits is taken. Not yet measured: 64 outputs keep the tensor
cores' tile whole, and 128 inputs are 64 bytes of a row, two sectors; 64 tokens leave registers for
half of that."""

DEQUANTIZE_FROM = {"sm_80": 256, "sm_90": 256}
"""Tokens from which a chip dequantizes first and multiplies in 16 bits. Not yet measured.

Reading at 4 bits repeats the decoding for each 64 tokens: about ``N K`` table look-ups, of which
an SM does 32 a cycle, so 2.3 us for 4096 x 4096 on 132 SMs at 1.7 GHz. Dequantizing moves 4.5
bytes a weight, once: 22 us at 3.35 TB/s. The two meet after some nine tiles of 64 tokens; cuBLAS is
nearer to the tensor cores' rate than a kernel that decodes, which brings the point down."""

DEQUANTIZE_FROM_ELSEWHERE = 256

EXPAND_UP_TO = 64
"""Tokens up to which the adapters' expand is the product's epilogue. Not yet measured.

So many are one tile of the 16-bit products, and a worn slot's rows of B are read once. Tokens of
further tiles may wear the same slot and would have them read again; not so by the grouped expand,
whose tokens are sorted by slot."""

DEQUANTIZE_BLOCK = 4096
REDUCE_BLOCK = 1024
RANK_BLOCK = 16
MIN_STEPS = 4
"""Steps of the inner loop that each program along K keeps."""


@functools.cache
def _chip(index: int) -> tuple[str, int]:
    """A CUDA device's architecture and its number of multiprocessors."""
    found = torch.cuda.get_device_properties(index)
    return f"sm_{found.major}{found.minor}", found.multi_processor_count


def chip_of(device: torch.device) -> tuple[str, int]:
    """The architecture and number of multiprocessors; ("interpreter", 8) off CUDA."""
    if device.type != "cuda":
        return "interpreter", 8
    return _chip(device.index if device.index is not None else torch.cuda.current_device())


def tile_for(tokens: int, dtype: torch.dtype) -> MatmulTile:
    """The first row of :data:`MATMUL_TILES` that fits."""
    bits = 8 * dtype.itemsize
    return next(t for t in MATMUL_TILES if t.bits == bits and tokens <= t.tokens)


def block_k_for(tile: MatmulTile, n_in: int) -> int | None:
    """The largest step along K that the tile and the shape allow, None where 32 does not divide."""
    block = tile.block_k
    while block >= 32:
        if n_in % block == 0:
            return block
        block //= 2
    return None


def split_for(tile: MatmulTile, tokens: int, n_out: int, steps: int, processors: int) -> int:
    """Programs along K: doubled until two multiprocessors have three, each keeping enough steps.

    Depends on the tokens through their tile alone, so that a batch padded within it keeps its bits.
    """
    programs = -(-n_out // tile.block_n) * -(-tokens // tile.block_t)
    split = 1
    while 2 * programs * split < 3 * processors and steps >= 2 * split * MIN_STEPS:
        split *= 2
    return split


class TritonFourBit:
    """Products with 4-bit weights; see :class:`manyhats_kernels.fourbit.FourBit`.

    From :data:`DEQUANTIZE_FROM` tokens on, and where K is no multiple of 32, the matrix is
    dequantized and multiplied by cuBLAS; the choice is made on the host from the shapes alone. An
    expand is then added to the rounded product, which rounds a second time.
    """

    def dequantize_4bit(self, weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
        """See :meth:`FourBit.dequantize_4bit`."""
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
        grid = (-(-out.numel() // DEQUANTIZE_BLOCK),)
        kernels.dequantize_kernel[grid](
            out,
            weight.packed,
            weight.code,
            *_scales(weight),
            out.numel(),
            RUN=weight.blocksize,
            NESTED=_nested_run(weight),
            BLOCK=DEQUANTIZE_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
        return out

    def matmul_4bit(
        self,
        x: Tensor,
        weight: FourBitWeight,
        bias: Tensor | None = None,
        expand: Expand | None = None,
    ) -> Tensor:
        """See :meth:`FourBit.matmul_4bit`."""
        check_matmul_4bit(x, weight, bias, expand)
        if expand is not None and not any_worn(expand.batch):
            expand = None
        tile = tile_for(x.shape[0], x.dtype)
        block_k = block_k_for(tile, weight.shape[1])
        chip, processors = chip_of(x.device)
        if block_k is None or x.shape[0] >= DEQUANTIZE_FROM.get(chip, DEQUANTIZE_FROM_ELSEWHERE):
            y = functional.linear(x, self.dequantize_4bit(weight, x.dtype), bias)
            if expand is not None:
                _add_expand(y, expand)
            return y
        return fused(x, weight, bias, expand, tile, block_k, processors)


def fused(
    x: Tensor,
    weight: FourBitWeight,
    bias: Tensor | None,
    expand: Expand | None,
    tile: MatmulTile,
    block_k: int,
    processors: int,
) -> Tensor:
    """The product at 4 bits with the tile given; arguments must have been checked.

    ``block_k`` divides K, ``processors`` are those among which programs are spread.
    """
    (n_out, n_in), tokens = weight.shape, x.shape[0]
    out = torch.empty((tokens, n_out), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    split = split_for(tile, tokens, n_out, n_in // block_k, processors)
    parts = None
    if split > 1:
        parts = torch.empty((split, tokens, n_out), dtype=torch.float32, device=x.device)
    grid = (-(-n_out // tile.block_n), -(-tokens // tile.block_t), split)
    kernels.matmul_kernel[grid](
        out,
        parts,
        x,
        weight.packed,
        weight.code,
        *_scales(weight),
        bias,
        tokens,
        n_out,
        n_in,
        x.stride(0),
        *_expand_arguments(expand),
        RUN=weight.blocksize,
        NESTED=_nested_run(weight),
        PARTS=0 if expand is None else expand.shrunk.shape[0],
        SPLIT=split > 1,
        BLOCK_N=tile.block_n,
        BLOCK_T=tile.block_t,
        BLOCK_K=block_k,
        BLOCK_R=RANK_BLOCK,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        EXPAND_PRECISION=expand_precision(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    if parts is not None:
        kernels.reduce_kernel[(-(-n_out // REDUCE_BLOCK), tokens)](
            out, parts, bias, tokens, n_out, split, BLOCK=REDUCE_BLOCK
        )
    return out


def _add_expand(y: Tensor, expand: Expand) -> None:
    tile = tile_for(y.shape[0], y.dtype)
    grid = (-(-y.shape[1] // tile.block_n), -(-y.shape[0] // tile.block_t))
    kernels.expand_kernel[grid](
        y,
        *y.shape,
        *_expand_arguments(expand),
        PARTS=expand.shrunk.shape[0],
        BLOCK_N=tile.block_n,
        BLOCK_T=tile.block_t,
        BLOCK_R=RANK_BLOCK,
        PRECISION=expand_precision(y.dtype),
        num_warps=tile.warps,
    )


def expand_precision(dtype: torch.dtype) -> str:
    """How the shrunk rows, fp32, meet B: TF32 has 16-bit weights' bits whole, and 11 of theirs."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _nested_run(weight: FourBitWeight) -> int:
    return 0 if weight.nested is None else weight.nested.blocksize


def _scales(weight: FourBitWeight) -> tuple[Tensor | None, ...]:
    nested = weight.nested
    if nested is None:
        return weight.absmax, None, None, None
    return weight.absmax, nested.code, nested.scale, nested.offset


def _expand_arguments(expand: Expand | None) -> tuple[Tensor | int | None, ...]:
    if expand is None:
        return (None, None, None, None, 0, None, None, None, 0, 0, 0, 0)
    batch, rows, b = expand.batch, expand.rows, expand.b
    return (
        expand.shrunk,
        batch.slots,
        batch.segment_slots,
        batch.segment_offsets,
        batch.segment_slots.shape[0],
        rows.start,
        rows.count,
        b,
        b.shape[0],
        b.stride(0),
        expand.shrunk.stride(1),
        expand.shrunk.shape[2],
    )
