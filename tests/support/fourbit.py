"""4-bit weights made by bitsandbytes, and adapters' halves to be added to their products."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch

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
    seed: int = 0,
) -> Expand:
    """Signed shrunk rows; NaN in the columns over a token's own rank and in rows of other slots."""
    case = lora_case(Workload(slots, counts), 8, n_out, dtype, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    shrunk = torch.full((len(slots), max(counts) + 2), float("nan"))
    for token, slot in enumerate(slots):
        if slot >= 0:
            shrunk[token, : counts[slot]] = torch.randn(counts[slot], generator=random)
    return Expand(shrunk, case.b, case.rows, case.batch)
