"""4-bit matrices whose rows are of unlike size."""

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from manyhats_kernels.fourbit import FourBitWeight


def quantized(n, k, kind="nf4", blocksize=64):
    """A signed matrix as bitsandbytes quantizes it, and what it dequantizes it to."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator) * 3
    packed, state = quantize_4bit(weight.bfloat16(), quant_type=kind, blocksize=blocksize)
    made = FourBitWeight(packed, (n, k), state.blocksize, state.code, state.absmax)
    return made, dequantize_4bit(packed, state)
