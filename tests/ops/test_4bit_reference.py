"""The 4-bit reference against bitsandbytes' own dequantize, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from support.fourbit import expand_case, quantized

from manyhats_kernels.fourbit import Expand, FourBitWeight
from manyhats_kernels.reference_4bit import dequantize_4bit, matmul_4bit

SHAPES = [(32, 64), (3, 5), (7, 9), (1, 1), (33, 100), (40, 192)]


@pytest.fixture(scope="module", autouse=True)
def _eager():
    """bitsandbytes compiles its generic dequantize, for seconds; the function runs as it is."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def oracle(packed, state) -> torch.Tensor:
    """bitsandbytes' generic dequantize, which it takes for an odd last dimension.

    Its AVX512 one, for the others, starts a new run of values at each row, also where the runs of
    its own quantize go on over the row's end: there it is far from the weights.
    """
    shape, state.shape = state.shape, torch.Size((state.shape[0] * state.shape[1], 1))
    out = bnb.dequantize_4bit(packed, state).reshape(shape)
    state.shape = shape
    return out


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_equals_bitsandbytes(dtype, kind, nested, blocksize):
    for shape in SHAPES:
        weight, packed, state = quantized(
            shape, dtype, kind=kind, nested=nested, blocksize=blocksize, seed=blocksize
        )
        actual = dequantize_4bit(weight, dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual, oracle(packed, state))
        if shape[1] % 2 or shape[1] % blocksize == 0:
            assert torch.equal(actual, bnb.dequantize_4bit(packed, state))


def test_the_scales_of_several_outer_runs_are_undone():
    """Double quantization keeps one scale for 256 scales: here there are three and a bit."""
    weight, packed, state = quantized((100, 512), torch.float32, nested=True, blocksize=64)
    assert weight.nested is not None
    assert weight.nested.scale.numel() == 4
    assert torch.equal(dequantize_4bit(weight, torch.float32), bnb.dequantize_4bit(packed, state))


def test_the_product_is_that_of_the_dequantized_matrix(dtype):
    weight, packed, state = quantized((48, 64), dtype)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, 48).to(dtype)
    expected = x.double() @ bnb.dequantize_4bit(packed, state).double().T + bias.double()
    torch.testing.assert_close(
        matmul_4bit(x, weight, bias).double(), expected, rtol=8e-3, atol=8e-3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(3, dtype=torch.uint8)}, "packed must be 16"),
        ({"code": torch.zeros(8)}, "code must be 16"),
        ({"absmax": torch.zeros(1, dtype=torch.uint8)}, "absmax must be 1 contiguous values of"),
        ({"absmax": torch.zeros(2)}, "absmax must be 1 "),
        ({"blocksize": 48}, "blocksize 48 is not legal"),
        ({"shape": (0, 8)}, "shape 0 x 8"),
    ],
    ids=["packed", "code", "absmax_dtype", "absmax_size", "blocksize", "shape"],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {
        "packed": torch.zeros(16, dtype=torch.uint8),
        "shape": (4, 8),
        "blocksize": 64,
        "code": torch.zeros(16),
        "absmax": torch.zeros(1),
    }
    FourBitWeight(**parts)
    with pytest.raises(ValueError, match=message):
        FourBitWeight(**(parts | change))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 63), None, "x must be"),
        (torch.zeros(2, 64, dtype=torch.float64), None, "x must be"),
        (torch.zeros(64, 2).T, None, "contiguous"),
        (torch.zeros(2, 64), torch.zeros(47), "bias must be"),
        (torch.zeros(2, 64), torch.zeros(48).half(), "bias must be"),
    ],
    ids=["width", "dtype", "stride", "bias", "bias_dtype"],
)
def test_arguments_that_do_not_fit_are_refused(x, bias, message):
    weight, _, _ = quantized((48, 64), torch.float32)
    with pytest.raises(ValueError, match=message):
        matmul_4bit(x, weight, bias)


def test_an_expand_that_does_not_fit_is_refused():
    weight, _, _ = quantized((48, 64), torch.float32)
    good = expand_case((0, 1, -1), (4, 2), 48, torch.float32)
    x = torch.zeros(3, 64)
    matmul_4bit(x, weight, None, good)
    for shrunk, b, message in (
        (good.shrunk.half(), good.b, "shrunk must be float32"),
        (good.shrunk[1:], good.b, "shrunk must be float32"),
        (good.shrunk, good.b[:, 1:], "b must be"),
        (good.shrunk.T.contiguous().T, good.b, "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            matmul_4bit(x, weight, None, Expand(shrunk, b, good.rows, good.batch))
    with pytest.raises(ValueError, match="the plan has 3 tokens"):
        matmul_4bit(x[:2], weight, None, Expand(good.shrunk[:2], good.b, good.rows, good.batch))
