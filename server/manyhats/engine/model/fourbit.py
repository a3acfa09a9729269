"""4-bit layers: the kernels' own product in bitsandbytes' place, reading the weights once.

bitsandbytes keeps the weights; its packed bytes and scales are read where they lie.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

from manyhats_kernels import FourBit, FourBitWeight, NestedScales


def weight_of(packed: torch.Tensor, state: Any) -> FourBitWeight:
    """What ``quantize_4bit`` gave, as the kernels take it: the same memory, nothing copied.

    Raises ValueError where its parts do not fit together (``packing_format_for_cpu`` among them).
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("the weight was repacked for bitsandbytes' CPU kernel")
    nested = state.state2
    return FourBitWeight(
        packed=packed.view(torch.uint8),
        shape=(state.shape[0], state.shape[1]),
        blocksize=state.blocksize,
        code=state.code,
        absmax=state.absmax,
        nested=None
        if nested is None
        else NestedScales(nested.code, nested.absmax, state.offset, nested.blocksize),
    )


class FourBitLinear:
    """The forward of a ``Linear4bit`` by a backend's own product, in the activations' dtype."""

    __slots__ = ("_backend", "_module", "weight")

    def __init__(self, module: Any, backend: FourBit) -> None:
        self._backend = backend
        self._module = module
        self.weight = weight_of(module.weight.data, module.weight.quant_state)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's own bias, [out]."""
        bias: torch.Tensor | None = self._module.bias
        return None if bias is None else bias.data

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out], of x's dtype."""
        n_out, n_in = self.weight.shape
        y = self._backend.matmul_4bit(x.reshape(-1, n_in), self.weight, self.bias)
        return y.view(*x.shape[:-1], n_out)


def read_four_bits(model: PreTrainedModel, backend: FourBit) -> None:
    """Gives every 4-bit layer the forward above. The model must be where it will run."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.forward = FourBitLinear(module, backend)
