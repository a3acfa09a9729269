"""4-bit weights made by bitsandbytes, and adapters' halves to be added to their products."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from support.device import DEVICE
from torch import nn
from transformers import PreTrainedModel

from manyhats_kernels.fourbit import Expand, FourBitWeight, NestedScales
from manyhats_kernels.testing import Workload, lora_case


def of_state(packed: torch.Tensor, state: Any) -> FourBitWeight:
    """The value that the kernels take, of what bitsandbytes' ``quantize_4bit`` gave."""
    nested = state.state2
    return FourBitWeight(
        packed=packed,
        shape=tuple(state.shape),
        blocksize=state.blocksize,
        code=state.code,
        absmax=state.absmax,
        nested=None
        if nested is None
        else NestedScales(nested.code, nested.absmax, state.offset, nested.blocksize),
    )


def quantized(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    kind: str = "nf4",
    nested: bool = False,
    blocksize: int = 64,
    seed: int = 0,
) -> tuple[FourBitWeight, torch.Tensor, Any]:
    """Signed weights whose rows differ in size, and bitsandbytes' own packed tensor and state."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random) * torch.rand(shape[0], 1, generator=random)
    packed, state = bnb.quantize_4bit(
        (values * shape[1] ** -0.5).to(dtype),
        blocksize=blocksize,
        quant_type=kind,
        compress_statistics=nested,
    )
    return of_state(packed, state), packed, state


def expand_case(
    slots: tuple[int, ...],
    counts: tuple[int, ...],
    n_out: int,
    dtype: torch.dtype,
    *,
    parts: int = 1,
    seed: int = 0,
) -> Expand:
    """Signed shrunk rows; NaN in the columns over a token's own rank and in rows of other slots."""
    case = lora_case(Workload(slots, counts), 8, n_out, dtype, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    shrunk = torch.full((parts, len(slots), max(counts, default=0) + 2), float("nan"))
    for token, slot in enumerate(slots):
        if slot >= 0:
            shrunk[:, token, : counts[slot]] = torch.randn(parts, counts[slot], generator=random)
    return Expand(shrunk, case.b, case.rows, case.batch)


def in_four_bits(
    model: PreTrainedModel, *, nested: bool = True
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model with bitsandbytes' NF4 layers in place of its linear ones but the head, on
    :data:`DEVICE`; and the same weights, dequantized, in plain layers.
    """
    plain, four = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in plain.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        made = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=module.weight.dtype,
            compress_statistics=nested,
            quant_type="nf4",
        )
        made.weight = Params4bit(
            module.weight.data.clone(),
            requires_grad=False,
            compress_statistics=nested,
            quant_type="nf4",
        ).to(DEVICE)
        made.bias = copy.deepcopy(module.bias)
        parent, _, child = name.rpartition(".")
        setattr(four.get_submodule(parent), child, made.eval())
        dense = bnb.dequantize_4bit(made.weight.data, made.weight.quant_state)
        module.weight.data = dense.to("cpu", module.weight.dtype)
    return four.to(DEVICE), plain
