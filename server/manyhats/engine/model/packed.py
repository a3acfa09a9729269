"""Long batches over 4-bit weights on a CPU: unpack to bf16, then oneDNN's matrix product.

bitsandbytes' CPU kernel reads the weights at 4 bits, which wins for few rows, and takes five to
eight times as long as unpacking and multiplying at 512 rows (a prompt's chunk).
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from manyhats_kernels import Unpacker

UNPACK_ROWS = 32
"""Up to this many rows bitsandbytes' own kernel is as quick or quicker (measured, two cores)."""


class PackedLinear:
    """The forward of a ``Linear4bit`` whose weight bitsandbytes has packed for the CPU.

    The scratch weight is shared by all layers of a shape: layers run one after the other, on the
    step thread alone.
    """

    __slots__ = ("_base", "_module", "_scratch", "_unpacker")

    def __init__(
        self, module: Any, unpacker: Unpacker, scratch: dict[tuple[int, int], torch.Tensor]
    ) -> None:
        self._base = module.forward
        self._module = module
        self._unpacker = unpacker
        self._scratch = scratch

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: bf16 [..., in] -> [..., out]."""
        module = self._module
        state = module.weight.quant_state
        rows = x.numel() // x.shape[-1]
        if rows <= UNPACK_ROWS or not getattr(state, "packing_format_for_cpu", False):
            out: torch.Tensor = self._base(x)
            return out
        shape = (module.out_features, module.in_features)
        weight = self._scratch.get(shape)
        if weight is None:
            weight = self._scratch[shape] = torch.empty(shape, dtype=torch.bfloat16)
        self._unpacker.unpack4(weight, module.weight.data, state.absmax, state.code)
        return functional.linear(x, weight, module.bias)


def unpack_long_batches(model: PreTrainedModel, unpacker: Unpacker) -> None:
    """Gives every 4-bit layer that bitsandbytes packs for the CPU the forward above."""
    scratch: dict[tuple[int, int], torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.forward = PackedLinear(module, unpacker, scratch)
