"""Operations of the base model that a backend may do in one pass where PyTorch takes several."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from manyhats_kernels.backend import DTYPES


@runtime_checkable
class DenseOps(Protocol):
    """What :func:`rms_norm` and :func:`silu_mul` define, faster."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :func:`rms_norm`."""

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """See :func:`silu_mul`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))`` over the last dimension, as LlamaRMSNorm has it.

    ``x`` is ``[T, n]``, its last dimension contiguous, ``weight`` ``[n]``, of one dtype of bf16,
    fp16, fp32. The mean is fp32; the normalized x is rounded to the dtype, then the product.
    Returns ``[T, n]``, contiguous. Raises ValueError on shapes or dtypes that do not fit.
    """
    check_rms_norm(x, weight)
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, the silu rounded to the dtype first.

    Both are ``[T, n]`` of one dtype of bf16, fp16, fp32, their last dimension contiguous. Returns
    ``[T, n]``, contiguous. Raises ValueError on shapes or dtypes that do not fit.
    """
    check_silu_mul(gate, up)
    return functional.silu(gate) * up


def check_rms_norm(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the arguments fit :func:`rms_norm`."""
    n = x.shape[-1]
    fits = x.ndim == 2 and weight.shape == (n,) and x.dtype == weight.dtype and x.dtype in DTYPES
    if not fits or not weight.is_contiguous() or (n > 1 and x.stride(1) != 1):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not "
            "fit: [T, n] and [n] of one dtype, the last dimension contiguous"
        )


def check_silu_mul(gate: Tensor, up: Tensor) -> None:
    """Raise ValueError unless the arguments fit :func:`silu_mul`."""
    fits = gate.ndim == 2 and gate.shape == up.shape and gate.dtype == up.dtype
    rows = gate.ndim == 2 and (gate.shape[1] < 2 or gate.stride(1) == up.stride(1) == 1)
    if not fits or not rows or gate.dtype not in DTYPES:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} do not "
            "fit: [T, n] of one dtype, the last dimension contiguous"
        )
