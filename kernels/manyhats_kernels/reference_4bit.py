"""NF4 and FP4 in the plainest PyTorch: what the 4-bit kernels are held to.

The codes and the layout are those of bitsandbytes (QLoRA, arXiv 2305.14314): its own
``dequantize_4bit`` gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhats_kernels.batch import AdapterBatch
from manyhats_kernels.fourbit import Expand, FourBitWeight, check_matmul_4bit
from manyhats_kernels.groups import AdaptedFourBit, SiteWeights


def scales(weight: FourBitWeight) -> Tensor:
    """The scale of each run of values, fp32; double quantization is undone."""
    nested = weight.nested
    if nested is None:
        return weight.absmax.reshape(-1)
    index = torch.arange(weight.absmax.numel(), device=weight.absmax.device) // nested.blocksize
    inner = nested.code.reshape(-1)[weight.absmax.reshape(-1).long()]
    # a product, rounded, and then a sum: one fused operation would give other bits
    return inner * nested.scale.reshape(-1)[index] + nested.offset.reshape(())


def dequantize_4bit(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """``[N, K]`` of ``dtype``: the product of code and scale in fp32, rounded once."""
    n, k = weight.shape
    packed = weight.packed.reshape(-1)
    nibbles = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[: n * k]
    of_value = torch.arange(n * k, device=packed.device) // weight.blocksize
    flat = weight.code.reshape(-1)[nibbles.long()] * scales(weight)[of_value]
    return flat.to(dtype).reshape(n, k)


def matmul_4bit(
    x: Tensor, weight: FourBitWeight, bias: Tensor | None = None, expand: Expand | None = None
) -> Tensor:
    """See ``FourBit.matmul_4bit``: dequantize, then multiply and add in fp32."""
    check_matmul_4bit(x, weight, bias, expand)
    y = x.float() @ dequantize_4bit(weight, x.dtype).float().T
    if bias is not None:
        y += bias.float()
    if expand is not None:
        for token, slot in enumerate(expand.batch.slots.tolist()):
            if slot >= 0:
                start, count = int(expand.rows.start[slot]), int(expand.rows.count[slot])
                shrunk = expand.shrunk[:, token, :count].sum(0)
                y[token] += shrunk @ expand.b[start : start + count].float()
    return y.to(x.dtype)


def matmul_4bit_lora_group(
    x: Tensor, group: AdaptedFourBit, worn: Sequence[bool], batch: AdapterBatch
) -> list[Tensor]:
    """See ``FusedFourBit.matmul_4bit_lora_group``: one site after the other, rounded once."""
    group.check(x, worn, batch)
    return [
        matmul_4bit(x, weight, bias, _shrunk(x, site, batch) if here else None)
        for weight, bias, site, here in zip(
            group.weights, group.biases, group.sites.sites, worn, strict=True
        )
    ]


def _shrunk(x: Tensor, site: SiteWeights, batch: AdapterBatch) -> Expand:
    """Each token's first half, one token at a time."""
    width = max((int(site.rows.count[slot]) for slot in batch.worn), default=0)
    halves = torch.zeros((1, x.shape[0], width), device=x.device)
    for token, slot in enumerate(batch.slots.tolist()):
        if slot >= 0:
            start, count = int(site.rows.start[slot]), int(site.rows.count[slot])
            halves[0, token, :count] = site.a[start : start + count].float() @ x[token].float()
    return Expand(halves, site.b, site.rows, batch)
