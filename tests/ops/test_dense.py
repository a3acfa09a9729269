"""The base's own operations in C against what defines them, and against double precision."""

import pytest
import torch

from manyhats_kernels import dense, resolve

SHAPES = [(1, 1), (3, 5), (4, 16), (7, 33), (33, 576), (2, 1000)]


@pytest.fixture(scope="module")
def native(native_cache):
    return resolve("native", device=torch.device("cpu"), cache_dir=native_cache).backend


def signed(tokens, n, dtype, seed, margin=3):
    """A view whose neighbours are NaN."""
    wide = torch.full((tokens, n + margin), torch.nan, dtype=dtype)
    wide[:, :n] = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed)) * 3
    return wide[:, :n]


def eps_of(dtype):
    """What one rounding may cost; sums and the exponential take a few of fp32's."""
    return torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)


@pytest.mark.parametrize(("tokens", "n"), SHAPES)
def test_rms_norm(native, dtype, tokens, n):
    x, weight = signed(tokens, n, dtype, n), torch.linspace(-2, 3, n).to(dtype)
    y = native.rms_norm(x, weight, 1e-5)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 1.1 * eps_of(dtype) * exact.abs() + 1e-7).all()
    same = dense.rms_norm(x, weight, 1e-5)
    assert ((y - same).abs() <= eps_of(dtype) * same.abs() + 1e-7).all()


@pytest.mark.parametrize(("tokens", "n"), SHAPES)
def test_silu_mul(native, dtype, tokens, n):
    gate, up = signed(tokens, n, dtype, n), signed(tokens, n, dtype, n + 1)
    gate[0, 0] = 80.0
    gate[-1, -1] = -80.0
    y = native.silu_mul(gate, up)
    wide = gate.double()
    exact = wide * torch.sigmoid(wide) * up.double()
    assert ((y.double() - exact).abs() <= 1.1 * eps_of(dtype) * exact.abs() + 1e-7).all()
    same = dense.silu_mul(gate, up)
    assert torch.allclose(y.float(), same.float(), rtol=2 * eps_of(dtype), atol=1e-7)


def test_what_does_not_fit_is_refused(native):
    x = torch.zeros(3, 8)
    for operations in (native, dense):
        for bad, weight in ((x[:, ::2], torch.ones(4)), (x, torch.ones(7)), (x.half(), x[0])):
            with pytest.raises(ValueError, match="do not fit"):
                operations.rms_norm(bad, weight, 1e-5)
        for gate, up in ((x, x[:2]), (x, x.half()), (x[0], x[0]), (x.int(), x.int())):
            with pytest.raises(ValueError, match="do not fit"):
                operations.silu_mul(gate, up)
