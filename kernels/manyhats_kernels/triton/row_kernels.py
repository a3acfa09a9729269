"""Bodies of what each token has done with its slot's vector; ``rows.py`` launches them.

A program is a token (or a stretch of its columns); one of the base returns at once.
"""

import triton
import triton.language as tl


@triton.jit
def row_kernel(
    y, values, slots, stride_y, stride_values, n, SCALE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """y[t] += values[slots[t]], or *= with SCALE, for the tokens whose slot is not -1."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n
    y_row = y + token.to(tl.int64) * stride_y + columns
    own = tl.load(values + slot.to(tl.int64) * stride_values + columns, mask=inside, other=0.0)
    before = tl.load(y_row, mask=inside, other=0.0).to(tl.float32)
    after = before * own.to(tl.float32) if SCALE else before + own.to(tl.float32)
    tl.store(y_row, after, mask=inside)


@triton.jit
def norm_kernel(
    y, x, gain, has, shift, slots, stride_y, stride_x, stride_gain, n, eps,
    CENTERED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t] = gain[s] * (x[t] - m) / sqrt(mean((x[t] - m)^2) + eps) + shift where has[s] is not 0.

    ``s = slots[t]``; m is the mean of x[t] with CENTERED, else 0. The mean is taken first, then the
    squares about it: no difference of two large sums.
    """
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    if tl.load(has + slot) == 0:
        return
    x_row = x + token.to(tl.int64) * stride_x
    y_row = y + token.to(tl.int64) * stride_y
    gain_row = gain + slot.to(tl.int64) * stride_gain
    mean = 0.0
    if CENTERED:
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, n, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            total += tl.load(x_row + columns, mask=columns < n, other=0.0).to(tl.float32)
        mean = tl.sum(total) / n
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, n, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        value = tl.load(x_row + columns, mask=columns < n, other=0.0).to(tl.float32)
        away = tl.where(columns < n, value - mean, 0.0)
        squares += away * away
    factor = 1.0 / tl.sqrt(tl.sum(squares) / n + eps)
    for first in range(0, n, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        inside = columns < n
        value = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(gain_row + columns, mask=inside, other=0.0).to(tl.float32)
        result = (value - mean) * factor * own
        if shift is not None:
            result += tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_row + columns, result, mask=inside)
