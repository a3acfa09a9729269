"""Body of the biases' addition; ``bias.py`` launches it."""

import triton
import triton.language as tl


@triton.jit
def bias_kernel(y, bias, slots, stride_y, stride_bias, n_out, BLOCK_N: tl.constexpr):
    """y[t, n] += bias[slots[t], n] for the tokens whose slot is not -1."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_out
    y_row = y + token.to(tl.int64) * stride_y + columns
    e = tl.load(bias + slot.to(tl.int64) * stride_bias + columns, mask=inside, other=0.0)
    before = tl.load(y_row, mask=inside, other=0.0)
    tl.store(y_row, before.to(tl.float32) + e.to(tl.float32), mask=inside)
