"""Launches of what each token has done with its slot's vector: bias, scale, gain of a norm.

Arguments must have been checked; ``slots`` is int32 [T], -1 for a token of the base.
"""

from __future__ import annotations

from torch import Tensor

from manyhats_kernels.triton import row_kernels

COLUMNS = 1024
WARPS = 4


def combine_rows(y: Tensor, values: Tensor, slots: Tensor, *, scale: bool) -> None:
    """``y[t]`` [T, n] times (``scale``) or plus ``values[slots[t]]`` [slots, n], in place."""
    if y.numel():
        row_kernels.row_kernel[(y.shape[0], -(-y.shape[1] // COLUMNS))](
            y,
            values,
            slots,
            y.stride(0),
            values.stride(0),
            y.shape[1],
            SCALE=scale,
            BLOCK_N=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def norm_rows(
    y: Tensor,
    x: Tensor,
    gain: Tensor,
    has: Tensor,
    shift: Tensor | None,
    slots: Tensor,
    *,
    eps: float,
    centered: bool,
) -> None:
    """``y[t]`` [T, n] is the norm of ``x[t]`` with its slot's gain, where ``has[slot]``."""
    if y.numel():
        row_kernels.norm_kernel[(y.shape[0],)](
            y,
            x,
            gain,
            has,
            shift,
            slots,
            y.stride(0),
            x.stride(0),
            gain.stride(0),
            y.shape[1],
            eps,
            CENTERED=centered,
            BLOCK_N=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
