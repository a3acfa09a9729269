"""A bitsandbytes layer whose product is the kernels' own, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from support.device import DEVICE, DTYPES
from torch import nn

from manyhats.engine.model.fourbit import FourBitLinear, read_four_bits, weight_of
from manyhats_kernels.testing import assert_close
from manyhats_kernels.triton.quant import TritonFourBit


def layer(dtype, *, bias=True, nested=False):
    torch.manual_seed(3)
    made = bnb.nn.Linear4bit(
        192, 70, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4"
    )
    return made.to(dtype).to(DEVICE).eval()


def expected(module, x):
    """bitsandbytes' own weights, multiplied in fp32."""
    dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(x.float(), dense.to(x.dtype).float(), bias).to(x.dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layers_own_weights_are_multiplied(dtype, bias, nested):
    model = nn.Sequential(layer(dtype, bias=bias, nested=nested), nn.ReLU())
    x = torch.randn(1, 5, 192, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    wanted = expected(model[0], x)
    read_four_bits(model, TritonFourBit())
    assert isinstance(model[0].forward, FourBitLinear)
    with torch.inference_mode():
        actual = model[0](x)
    assert actual.shape == (1, 5, 70)
    assert_close(actual, wanted)


def test_nothing_is_copied():
    module = layer(torch.float16)
    weight = weight_of(module.weight.data, module.weight.quant_state)
    assert weight.packed.data_ptr() == module.weight.data.data_ptr()
    assert weight.absmax.data_ptr() == module.weight.quant_state.absmax.data_ptr()


@pytest.mark.skipif(
    DEVICE.type == "cuda" or not bnb.functional.has_avx512bf16(),
    reason="bitsandbytes repacks weights on a CPU with AVX512-BF16 alone",
)
def test_weights_repacked_for_the_cpu_are_refused():
    module = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    module = module.to("cpu").eval()
    with torch.inference_mode():
        module(torch.zeros(1, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="repacked"):
        weight_of(module.weight.data, module.weight.quant_state)
