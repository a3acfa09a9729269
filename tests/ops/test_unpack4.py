"""4-bit weights in bitsandbytes' own CPU layout, unpacked: it is the oracle, bit for bit."""

import pytest
import torch
from bitsandbytes.functional import (
    _convert_weight_packed_for_cpu,
    dequantize_4bit,
    quantize_4bit,
)

from manyhats_kernels import resolve

SHAPES = [(32, 64), (96, 128), (576, 192), (64, 1536)]


@pytest.fixture(scope="module")
def native(native_cache):
    return resolve("native", device=torch.device("cpu"), cache_dir=native_cache).backend


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_equals_bitsandbytes(native, kind, outputs, inputs):
    torch.manual_seed(outputs + inputs)
    weight = (torch.randn(outputs, inputs) * torch.rand(outputs, 1) * 3).bfloat16()
    packed, state = quantize_4bit(weight, quant_type=kind)
    # The packed layout keeps its scales in bf16, so the oracle gets those too.
    state.absmax = state.absmax.bfloat16().float()
    expected = dequantize_4bit(packed, state)
    packed, state = _convert_weight_packed_for_cpu(packed, state)
    out = torch.full((outputs, inputs), torch.nan, dtype=torch.bfloat16)
    native.unpack4(out, packed, state.absmax, state.code)
    assert torch.equal(out, expected)


def test_what_does_not_fit_is_refused(native):
    weight = torch.randn(64, 128).bfloat16()
    packed, state = _convert_weight_packed_for_cpu(*quantize_4bit(weight, quant_type="nf4"))
    out = torch.empty(64, 128, dtype=torch.bfloat16)
    for bad in (
        (out[:32], packed, state.absmax, state.code),
        (out.float(), packed, state.absmax, state.code),
        (out, packed, state.absmax.t(), state.code),
        (out, packed, state.absmax, state.code[:8]),
    ):
        with pytest.raises(ValueError, match="4-bit weights do not fit"):
            native.unpack4(*bad)
