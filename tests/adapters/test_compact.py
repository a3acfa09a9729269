"""The compact form: the same bits in one mapping, whatever parts there are."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny_model
from support.random_parts import KINDS, random_adapter
from support.sites import describe_plain

from manyhats.adapters.compact import compact
from manyhats.adapters.parts import CompiledAdapter, LowRank, SiteParts
from manyhats.types import Digest


@pytest.fixture(scope="module")
def spec():
    return describe_plain(tiny_model("llama"))


def tensors(adapter):
    return [t for parts in adapter.sites.values() for t in parts.tensors()]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_equal_in_one_mapping(old, new):
    assert new.nbytes == old.nbytes
    pairs = list(zip(tensors(old), tensors(new), strict=True))
    assert [(a.shape, a.dtype) for a, _ in pairs] == [(b.shape, b.dtype) for _, b in pairs]
    assert [bits(a) for a, _ in pairs] == [bits(b) for _, b in pairs]
    places = sorted((b.data_ptr(), b.nbytes) for _, b in pairs if b.numel())
    ends = [start + size for start, size in places]
    assert all(end <= after for end, (after, _) in zip(ends, places[1:], strict=False))
    dtypes = {b.dtype for _, b in pairs}
    assert not places or ends[-1] - places[0][0] < new.nbytes + 64 * len(dtypes)
    assert not {a.data_ptr() for a, _ in pairs if a.numel()} & {start for start, _ in places}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_part_keeps_its_bits(spec, kind, dtype):
    adapter = random_adapter(kind, spec, dtype=dtype)
    new = compact(adapter)
    assert_equal_in_one_mapping(adapter, new)
    assert (new.digest, new.family, new.virtual_tokens) == (
        adapter.digest,
        adapter.family,
        adapter.virtual_tokens,
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 70), st.integers(1, 9)), min_size=0, max_size=8
    )
)
def test_shapes_of_all_sizes_fit(shapes):
    generator = torch.Generator().manual_seed(len(shapes))
    sites = {
        f"s{i}": SiteParts(
            LowRank(
                torch.randn(rank, n_in, generator=generator, dtype=torch.float16),
                torch.randn(rank, n_out, generator=generator, dtype=torch.float16),
            ),
            bias=torch.randn(n_out, generator=generator),
        )
        for i, (rank, n_in, n_out) in enumerate(shapes)
    }
    adapter = CompiledAdapter(Digest("d"), "lora", sites)
    assert_equal_in_one_mapping(adapter, compact(adapter))


def test_the_files_bytes_go_and_the_tensors_outlive_the_adapter():
    class Bytes(bytearray):  # can be referred to weakly, as a bytearray cannot
        pass

    data = Bytes(4096)
    gone = weakref.ref(data)
    view = torch.frombuffer(data, dtype=torch.int16)[:64].view(8, 8)
    view.copy_(torch.arange(64).view(8, 8))
    old = CompiledAdapter(Digest("d"), "lora", {"s": SiteParts(LowRank(view, view.t()))})
    del data
    assert gone() is not None
    low_rank = compact(old).sites["s"].low_rank
    del old, view
    gc.collect()
    assert gone() is None
    assert low_rank.a.flatten().tolist() == list(range(64))
    assert low_rank.b.is_contiguous()
    assert torch.equal(low_rank.b, low_rank.a.t())
