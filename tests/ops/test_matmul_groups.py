"""The CPU's products with 4-bit and bf16 weights: bitsandbytes' dequantize is the oracle."""

import numpy as np
import pytest
import torch
from support.uneven_rows import quantized

from manyhats_kernels import reference_4bit, resolve
from manyhats_kernels.backend import SiteRows
from manyhats_kernels.batch import AdapterBatch
from manyhats_kernels.groups import DenseWeight, MatrixGroup, SiteGroup, SiteWeights
from manyhats_kernels.native.products import DOTS_ROWS

SHAPES = [(32, 64), (1, 64), (40, 128), (97, 192), (98, 64), (576, 192), (64, 1536)]
TOKENS = [1, 2, 3, 4, 15, 16, 17, 32, 33, 49, DOTS_ROWS + 6]


@pytest.fixture(scope="module", params=["amx", "dots"])
def native(request, native_cache):
    """The backend with AMX tiles and, as on a machine that has none, without."""
    backend = resolve("native", device=torch.device("cpu"), cache_dir=native_cache).backend
    if request.param == "dots":
        backend._amx = 0
    elif not backend._amx:
        pytest.skip("this machine has no AMX")
    return backend


def signed(tokens, k, margin=0):
    """Tokens by k out of a wider tensor whose margin is NaN."""
    wide = torch.full((tokens, k + margin), torch.nan, dtype=torch.bfloat16)
    wide[:, :k] = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    return wide[:, :k]


def assert_rounded(y, x, weight, bias=None):
    """One rounding to bf16 off the sums of double precision, at most."""
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact = exact + bias.double()
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + scale * 2**-20).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantize_gives_bitsandbytes_bits(native, kind, n, k):
    weight, expected = quantized(n, k, kind)
    assert torch.equal(native.dequantize_4bit(weight, torch.bfloat16), expected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_4bit_product(native, n, k, tokens):
    weight, dense = quantized(n, k, blocksize=64 if k % 128 else 128)
    x = signed(tokens, k, margin=7)
    bias = torch.linspace(-3, 3, n).bfloat16()
    assert_rounded(native.matmul_4bit(x, weight, bias), x, dense, bias)
    assert_rounded(native.matmul_4bit(x, weight), x, dense)


@pytest.mark.parametrize("tokens", [0, 1, 2, 18, 40])
def test_a_group_is_each_of_its_products(native, tokens):
    made = [quantized(n, 192) for n in (97, 32, 64)]
    biases = [None, torch.randn(32).bfloat16(), None]
    x = signed(tokens, 192)
    group = MatrixGroup([weight for weight, _ in made], biases)
    ys = native.matmul_group(x, group)
    for y, (weight, dense), bias in zip(ys, made, biases, strict=True):
        assert torch.equal(y, native.matmul_4bit(x, weight, bias))
        assert_rounded(y, x, dense, bias)


@pytest.mark.parametrize("tokens", TOKENS)
def test_bf16_group(native, tokens):
    weights = [signed(n, 192).contiguous() for n in (64, 97, 1)]
    dense = [DenseWeight(weight) for weight in weights]
    if not native._amx:
        assert not native.takes(dense[0])
        return
    x = signed(tokens, 192, margin=3)
    bias = torch.randn(97).bfloat16()
    ys = native.matmul_group(x, MatrixGroup(dense, [None, bias, None]))
    for y, weight, own in zip(ys, weights, [None, bias, None], strict=True):
        assert_rounded(y, x, weight, own)


def worn(slots, outs, k, counts):
    """Sites of signed rank rows, `counts` of each site and slot, with gaps between; the batch."""
    generator = torch.Generator().manual_seed(7)
    sites = []
    for out, of_slots in zip(outs, counts, strict=True):
        starts, rows = [], 2
        for count in of_slots:
            starts.append(rows if count else 0)
            rows += count + 1
        a, b = (torch.randn(rows, n, generator=generator) / 4 for n in (k, out))
        site_rows = SiteRows(*(torch.tensor(v, dtype=torch.int32) for v in (starts, of_slots)))
        sites.append(SiteWeights(a.bfloat16(), b.bfloat16(), site_rows))
    batch = AdapterBatch.build(np.array(slots), len(counts[0]))
    return SiteGroup(sites), batch


MIXES = {
    "long": [0] * 70,
    "ragged": [0] * 37 + [-1] * 5 + [1] * 33 + [0] * 9 + [2] * 3 + [3] * 40 + [1],
    "scattered": [(i * i) % 4 for i in range(200)],
    "short": [0] * 31 + [-1] + [1] * 31,
    "bare": [-1] * 40,
}


@pytest.mark.parametrize("four", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_a_group_with_low_rank_products(native, mix, four):
    """The last slot owns rows at the first site alone; slot 2 at no site."""
    outs, k, slots = (97, 32, 64), 192, MIXES[mix]
    counts = [[16, 5, 0, 64], [1, 33, 0, 0], [17, 16, 0, 0]]
    sites, batch = worn(slots, outs, k, counts)
    made = [quantized(n, k) for n in outs]
    dense = [weight for _, weight in made]
    weights = [weight for weight, _ in made] if four else [DenseWeight(w) for w in dense]
    if not native.takes(weights[0]):
        return
    x, biases = signed(len(slots), k, margin=3), [None, torch.randn(32).bfloat16(), None]
    ys = native.matmul_lora_group(x, MatrixGroup(weights, biases), sites, batch)
    for i, y in enumerate(ys):
        base = x.double() @ dense[i].double().T
        base = base if biases[i] is None else base + biases[i].double()
        own, size = torch.zeros_like(base), torch.zeros_like(base)
        for token, slot in enumerate(slots):
            if slot >= 0 and counts[i][slot]:
                start = int(sites.sites[i].rows.start[slot])
                a, b = (
                    m[start : start + counts[i][slot]].double()
                    for m in (sites.sites[i].a, sites.sites[i].b)
                )
                shrunk = x[token].double() @ a.T
                own[token] = shrunk @ b
                size[token] = shrunk.abs() @ b.abs()
        # What is not joined is rounded twice; shrunk rows are kept as two bf16 halves.
        bound = (base.abs() + (base + own).abs()) * 2**-8 + size * 2**-14 + 1e-3
        assert ((y.double() - base - own).abs() <= bound).all()
        lone = [t for t in range(len(slots)) if slots.count(slots[t]) < 32]
        apart = native.matmul_group(x, MatrixGroup(weights, biases))
        native.lora_add_group(apart, x, sites, batch)
        assert torch.equal(y[lone], apart[i][lone])
        joined = [t for t in range(len(slots)) if t not in lone and slots[t] >= 0]
        exact = base + own
        if native._amx and joined:
            assert (y - exact)[joined].abs().mean() < (apart[i] - exact)[joined].abs().mean()


def test_low_rank_rows_outside_of_the_pool_are_refused(native):
    sites, batch = worn([0] * 40, (64,), 192, [[16]])
    sites.sites[0].rows.start[0] = 4
    weight, _ = quantized(64, 192)
    with pytest.raises(ValueError, match="slot 0"):
        native.matmul_lora_group(signed(40, 192), MatrixGroup([weight], [None]), sites, batch)


def test_who_shares_the_batch_changes_no_bit(native):
    """From four tokens on, and among fewer: the sums of a token run over k in one order."""
    weight, _ = quantized(97, 192)
    x = signed(45, 192)
    together, few = native.matmul_4bit(x, weight), native.matmul_4bit(x[:3], weight)
    for token in (0, 15, 16, 41):
        assert torch.equal(native.matmul_4bit(x[token : token + 4], weight)[0], together[token])
    for token in (0, 1, 2):
        assert torch.equal(native.matmul_4bit(x[token : token + 1], weight)[0], few[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_multiplied_as_they_are(native, dtype):
    weight, _ = quantized(40, 128)
    x = signed(5, 128).to(dtype)
    y = native.matmul_4bit(x, weight)
    assert y.dtype == dtype
    exact = x.double() @ native.dequantize_4bit(weight, dtype).double().T
    assert torch.allclose(y.double(), exact, rtol=2e-3, atol=2e-2)


def test_ragged_rows_are_dequantized(native):
    """A run of 64 that two rows share is not for the C code (nor right in bitsandbytes' own)."""
    weight, _ = quantized(6, 96)
    dense = reference_4bit.dequantize_4bit(weight, torch.bfloat16)
    assert not native.takes(weight)
    x = signed(5, 96)
    assert_rounded(native.matmul_4bit(x, weight), x, dense)


def test_what_does_not_fit_is_refused(native):
    weight, _ = quantized(40, 128)
    group = MatrixGroup([weight], [None])
    for x in (signed(3, 64), signed(3, 128).float()):
        with pytest.raises(ValueError, match="x must be"):
            native.matmul_group(x, group)
    with pytest.raises(ValueError, match="one kind and of one input size"):
        MatrixGroup([weight, quantized(40, 64)[0]], [None, None])
    with pytest.raises(ValueError, match="bias must be"):
        MatrixGroup([weight], [torch.zeros(39).bfloat16()])
    with pytest.raises(ValueError, match="contiguous bf16"):
        DenseWeight(torch.zeros(4, 4))
