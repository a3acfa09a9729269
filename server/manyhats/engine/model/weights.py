"""Reads the loaded base's weights back, unpacked and in fp32, for the adapters that depend on them.

Of a quantized layer that is the dequantized weight in the dtype in which the layer multiplies, as
PEFT's ``dequantize_module_weight`` has it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_GROUP = 32
"""Outputs that bitsandbytes' CPU layout interleaves."""


class LoadedWeights:
    """``BaseWeights`` of a model in memory, whose layers have their final layout (one forward pass
    has run). ``modules``: by site name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules

    def weight(self, site_name: str) -> torch.Tensor:
        """As ``BaseWeights.weight``."""
        module: Any = self._modules[site_name]
        with torch.no_grad():
            if isinstance(module, bnb.nn.Linear4bit):
                found = _dequantized4(module)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                found = _dequantized8(module)
            elif isinstance(module, Conv1D):
                found = module.weight.t()
            else:
                found = module.weight
            return found.detach().to(
                "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
            )


def first_dequantization(model: nn.Module) -> None:
    """Dequantizes one 4-bit weight of ``model``, if it has any.

    At an operator's first call torch looks for its compiler: better where that is kept out
    (``lean.without_compiler``) than at the first registration that depends on the base's weights.
    """
    found = (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    for module in itertools.islice(found, 1):
        _dequantized4(module)


def _dequantized4(module: Any) -> torch.Tensor:
    weight, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return _unpacked(weight, state)
    plain = copy.copy(state)  # the call below may touch it
    dequantized: torch.Tensor = bnb.functional.dequantize_4bit(weight, plain)
    return dequantized


def _unpacked(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' ``_convert_weight_packed_for_cpu``, undone: uint8 [N, K / 2] to bf16 [N, K].

    The block scales stay rounded to bf16, as the layer multiplies by them.
    """
    outputs, half = packed.shape
    bytes_ = packed.reshape(-1, _GROUP)
    nibbles = torch.cat([bytes_ & 0xF, bytes_ >> 4], dim=1)
    nibbles = nibbles.reshape(outputs // _GROUP, half, _GROUP, 2).transpose(1, 2)
    values = state.code.float()[nibbles.reshape(outputs, 2 * half).long()]
    scales = state.absmax.float().t().repeat_interleave(state.blocksize, dim=1)
    unpacked: torch.Tensor = (values * scales).to(torch.bfloat16)
    return unpacked


def _dequantized8(module: Any) -> torch.Tensor:
    weight, state = module.weight, module.state
    rows = state.CB if state.CB is not None else weight.data
    scales = state.SCB if state.SCB is not None else weight.SCB
    dequantized: torch.Tensor = bnb.functional.int8_vectorwise_dequant(rows, scales)
    return dequantized
