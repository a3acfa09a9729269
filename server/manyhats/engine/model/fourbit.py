"""The 4-bit layers of the base on our own kernel, which reads bitsandbytes' weights as they lie."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

from manyhats_kernels.fourbit import FourBit, FourBitWeight, NestedScales


def four_bit_weight(module: Any) -> FourBitWeight:
    """The weight of a ``Linear4bit`` that has been quantized; shares its memory."""
    state = module.weight.quant_state
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedScales(inner.code, inner.absmax, state.offset, inner.blocksize)
    shape = (module.out_features, module.in_features)
    return FourBitWeight(
        module.weight.data, shape, state.blocksize, state.code, state.absmax, nested
    )


class FourBitLinear:
    """The forward of a ``Linear4bit``, computed in the model's dtype, ``dtype``."""

    __slots__ = ("_backend", "bias", "dtype", "weight")

    def __init__(self, module: Any, backend: FourBit, dtype: torch.dtype) -> None:
        self._backend = backend
        self.dtype = dtype
        self.weight = four_bit_weight(module)
        self.bias: torch.Tensor | None = (
            None if module.bias is None else module.bias.data.to(dtype).contiguous()
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        y = self._backend.matmul_4bit(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def use_four_bit_kernel(model: PreTrainedModel, backend: FourBit, dtype: torch.dtype) -> None:
    """Gives every 4-bit layer the forward above."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.forward = FourBitLinear(module, backend, dtype)
