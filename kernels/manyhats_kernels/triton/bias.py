"""Launch of the biases' addition: y[t] += bias[slot of t]."""

from __future__ import annotations

from torch import Tensor

from manyhats_kernels.triton import bias_kernels

COLUMNS = 1024
WARPS = 4


def bias_add(y: Tensor, bias: Tensor, slots: Tensor) -> None:
    """Add ``bias`` [slots, out] to ``y`` [T, out] in place, by ``slots`` int32 [T], -1 = none."""
    if y.numel():
        bias_kernels.bias_kernel[(y.shape[0], -(-y.shape[1] // COLUMNS))](
            y,
            bias,
            slots,
            y.stride(0),
            bias.stride(0),
            y.shape[1],
            BLOCK_N=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
