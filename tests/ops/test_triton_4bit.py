"""The Triton 4-bit kernels against the reference: in the interpreter, or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device import DTYPES, on_device
from support.fourbit import expand_case, quantized

from manyhats_kernels import reference_4bit
from manyhats_kernels.fourbit import FourBit
from manyhats_kernels.testing import WORKLOADS, assert_close
from manyhats_kernels.triton import quant
from manyhats_kernels.triton.quant import TritonFourBit

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

TRITON = TritonFourBit()
RAGGED = ((-1, 0, 2, 1, 2, 2, 3), (3, 17, 40, 0))
"""Base rows, a slot without rows, ranks under, at and over a step of the loop."""


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


def inputs(tokens, n_in, dtype, seed=0):
    """x as columns of something wider, as a slice of a fused projection is."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.full((tokens, n_in + 21), float("nan"), dtype=dtype)
    wide[:, 5 : n_in + 5] = torch.randn(tokens, n_in, generator=random).to(dtype)
    return on_device(wide)[:, 5 : n_in + 5]


def check(weight, x, bias=None, expand=None):
    moved = on_device(bias), on_device(expand)
    actual = TRITON.matmul_4bit(x, on_device(weight), *moved)
    assert actual.is_contiguous()
    assert actual.dtype == x.dtype
    expected = reference_4bit.matmul_4bit(x.cpu(), weight, bias, expand)
    assert_close(actual.cpu(), expected, scale=1.0)
    return actual


def test_it_is_a_backend_of_4_bits():
    assert isinstance(TRITON, FourBit)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_dequantizes_to_the_references_bits(dtype, kind, nested, blocksize):
    for shape in [(3, 5), (1, 1), (70, 192), (33, 100)]:
        weight, _, _ = quantized(shape, dtype, kind=kind, nested=nested, blocksize=blocksize)
        actual = TRITON.dequantize_4bit(on_device(weight), dtype)
        assert torch.equal(actual.cpu(), reference_4bit.dequantize_4bit(weight, dtype))


@pytest.mark.parametrize(("tokens", "nested"), [(1, True), (17, False), (70, True)])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((70, 192), 64), ((70, 160), 32), ((96, 256), 128), ((40, 128), 4096), ((31, 96), 64)],
    ids=str,
)
def test_product(dtype, tokens, shape, blocksize, nested):
    """Outputs that fill no tile; steps along K of 128, 64 and 32; runs that cross rows' ends."""
    kind = "fp4" if nested else "nf4"
    weight, _, _ = quantized(shape, dtype, kind=kind, nested=nested, blocksize=blocksize)
    bias = torch.linspace(-1, 1, shape[0]).to(dtype)
    x = inputs(tokens, shape[1], dtype)
    check(weight, x, bias)
    check(weight, x)


def test_every_column_counts(dtype):
    """One column of x at a time is not zero: each must meet its own weights, the last ones too."""
    weight, _, _ = quantized((33, 192), dtype)
    dense = reference_4bit.dequantize_4bit(weight, dtype)
    for first in (0, 64, 128, 144):
        x = torch.zeros(48, 192, dtype=dtype)
        x[torch.arange(48), first + torch.arange(48)] = 1
        actual = TRITON.matmul_4bit(on_device(x), on_device(weight)).cpu()
        assert torch.equal(actual, dense[:, first : first + 48].T)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", [(70, 192), (33, 100), (130, 2048)], ids=str)
def test_with_the_expand(dtype, shape, parts):
    """Fused; after a dequantized product (K of 100); and over programs that share K (2048)."""
    weight, _, _ = quantized(shape, dtype)
    check(
        weight,
        inputs(len(RAGGED[0]), shape[1], dtype),
        torch.linspace(-1, 1, shape[0]).to(dtype),
        expand_case(*RAGGED, shape[0], dtype, parts=parts),
    )


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload_with_the_expand(name):
    workload = WORKLOADS[name]()
    weight, _, _ = quantized((40, 64), torch.float16)
    x = inputs(len(workload.slots), 64, torch.float16)
    check(weight, x, None, expand_case(workload.slots, workload.counts, 40, torch.float16))


def test_base_tokens_keep_the_bits_of_the_plain_product(dtype):
    weight, _, _ = quantized((70, 192), dtype)
    x, slots = inputs(7, 192, dtype), torch.tensor(RAGGED[0])
    plain = check(weight, x)
    worn = check(weight, x, None, expand_case(*RAGGED, 70, dtype))
    idle = (slots < 0) | (slots == 3)  # slot 3 owns no rows
    assert torch.equal(plain[idle], worn[idle])
    assert not torch.equal(plain[~idle], worn[~idle])


def test_another_adapters_weights_change_no_bit(dtype):
    weight, _, _ = quantized((70, 192), dtype)
    x, expand = inputs(7, 192, dtype), expand_case(*RAGGED, 70, dtype)
    before = check(weight, x, None, expand)
    start, count = int(expand.rows.start[2]), int(expand.rows.count[2])
    expand.b[start : start + count] *= -3
    after = check(weight, x, None, expand)
    others = torch.tensor(RAGGED[0]) != 2
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_a_token_has_the_same_bits_in_any_batch_of_its_tile(dtype):
    """What padding a batch to a captured size rests on."""
    weight, _, _ = quantized((70, 192), dtype)
    x = inputs(16, 192, dtype)
    whole = check(weight, x)
    for tokens in (1, 5, 15):
        assert torch.equal(check(weight, x[:tokens]), whole[:tokens])


@pytest.mark.parametrize(
    ("start", "count"), [(0, 99), (-1, 2), (1 << 30, 1), (0, -1), (0, 43)], ids=str
)
def test_a_run_that_does_not_fit_makes_its_own_tokens_nan(start, count):
    """43 is one more than the shrunk rows are wide."""
    weight, _, _ = quantized((70, 192), torch.float32)
    x, expand = inputs(7, 192, torch.float32), expand_case(*RAGGED, 70, torch.float32)
    expand = dataclasses.replace(
        expand, b=torch.cat([expand.b, torch.zeros(1, 70)]) if count == 43 else expand.b
    )
    good = check(weight, x, None, expand)
    expand.rows.start[1], expand.rows.count[1] = start, count
    bad = TRITON.matmul_4bit(x, on_device(weight), None, on_device(expand))
    own = torch.tensor(RAGGED[0]) == 1
    assert bad[own].isnan().all()
    assert torch.equal(bad[~own], good[~own])


def test_no_tokens(dtype):
    weight, _, _ = quantized((70, 192), dtype)
    assert TRITON.matmul_4bit(inputs(0, 192, dtype), on_device(weight)).shape == (0, 70)


@st.composite
def drawn(draw):
    counts = tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)))
    slots = tuple(draw(st.lists(st.integers(-1, len(counts) - 1), min_size=1, max_size=20)))
    n_in = 32 * draw(st.integers(1, 7)) if draw(st.booleans()) else draw(st.integers(1, 90))
    return slots, counts, n_in, draw(st.integers(1, 80)), draw(st.booleans())


@settings(max_examples=15, deadline=None)
@given(drawn(), st.sampled_from([32, 64, 128]))
def test_drawn_shapes(case, blocksize):
    slots, counts, n_in, n_out, nested = case
    weight, _, _ = quantized((n_out, n_in), torch.float32, nested=nested, blocksize=blocksize)
    expand = expand_case(slots, counts, n_out, torch.float32)
    check(weight, inputs(len(slots), n_in, torch.float32), None, expand)


def test_the_table_leads_to_every_form():
    tile = quant.tile_for(8, torch.bfloat16)
    assert quant.tile_for(17, torch.bfloat16).block_t == 32
    assert quant.tile_for(1000, torch.bfloat16).block_t == 64
    assert [quant.block_k_for(tile, k) for k in (4096, 576, 96, 100)] == [128, 64, 32, None]
    assert quant.split_for(tile, 8, 4096, 32, 132) == 4  # 64 programs, eight steps each
    assert quant.split_for(tile, 8, 14336, 32, 132) == 1
    assert quant.split_for(tile, 8, 4096, 7, 132) == 1  # too short to share
    assert quant.split_for(tile, 8, 128256, 32, 132) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 32, 64, 300])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)], ids=str)
def test_the_shapes_of_an_8b_model(tokens, shape):
    weight, _, _ = quantized(shape, torch.bfloat16, nested=True)
    x = inputs(tokens, shape[1], torch.bfloat16)
    actual = TRITON.matmul_4bit(x, on_device(weight))
    dense = reference_4bit.dequantize_4bit(on_device(weight), torch.bfloat16)
    assert_close(actual, (x.float() @ dense.float().T).to(torch.bfloat16))
