"""The rank rows' memory: what is had ahead changes no row in use, and is what comes next."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.parts import SiteKind, SiteSpec
from manyhats.engine.row_memory import RowMemory

SIZES = {"q": (576, 576), "k": (576, 192), "down": (1536, 576), "odd": (33, 7)}
SITES = [SiteSpec(name, SiteKind.LINEAR, *sizes) for name, sizes in SIZES.items()]
ROWS = 96


def memory(dtype=torch.bfloat16, rows=ROWS):
    return RowMemory(SITES, rows, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sites_share_no_byte_and_begin_where_kernels_want_it(dtype):
    rows = memory(dtype)
    stretches = []
    for name, sizes in SIZES.items():
        for tensor, width in zip(rows.of(name), sizes, strict=True):
            assert tensor.shape == (ROWS, width)
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
            stretches.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    stretches.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(stretches))
    assert len({begin % 64 for begin, _ in stretches}) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_that_were_ever_written_keep_their_bits(data):
    """Whatever comes between: adapters of other ranks, on fewer sites, over rows given back."""
    rows = memory()
    kept = {}
    for number in range(data.draw(st.integers(1, 6))):
        runs = {}
        for name in data.draw(st.lists(st.sampled_from([*SIZES]), min_size=1, unique=True)):
            count = data.draw(st.integers(1, 24))
            runs[name] = (data.draw(st.integers(0, ROWS - count)), count)
        for name, (start, count) in runs.items():
            for tensor in rows.of(name):
                tensor[start : start + count] = -1.5 - number
        rows.wrote(runs | {"lm_head": (0, 3)})
        kept |= {
            (name, row): -1.5 - number
            for name, (start, count) in runs.items()
            for row in range(start, start + count)
        }
        for _ in range(data.draw(st.integers(0, 3))):
            rows.ahead()
    for (name, row), value in kept.items():
        assert all(bool((tensor[row] == value).all()) for tensor in rows.of(name))


def test_what_is_had_ahead_is_where_an_adapter_like_the_last_one_comes():
    rows = memory()
    for tensor in rows.of("q"):
        tensor.fill_(-1.0)
    rows.wrote({"q": (0, 40), "k": (0, 8)})
    given = rows.ahead()
    q = rows.of("q")[0]
    first = -(-(q.data_ptr() + 40 * 1152) // mmap.PAGESIZE) * mmap.PAGESIZE - q.data_ptr()
    zeros = (q.view(torch.uint8).flatten() == 0).nonzero().flatten().tolist()
    assert zeros == list(range(first, 80 * 1152, mmap.PAGESIZE)), "-1 has no byte that is 0"
    widths = 40 * (1152 + 1152) + 8 * (1152 + 384)
    assert abs(given - widths / mmap.PAGESIZE) <= 4


def test_it_is_had_once_and_not_further_and_further():
    rows = memory()
    rows.wrote({"q": (0, 40)})
    assert rows.ahead() > 0
    assert rows.ahead() == rows.ahead() == 0
    rows.wrote({"q": (0, 16)})  # over rows that another gave back
    assert rows.ahead() == 0
    rows.wrote({"q": (40, 16)})
    assert rows.ahead() == 0  # 56 + 16 are within the 80 that are there
    rows.wrote({"q": (56, 40)})
    assert rows.ahead() == 0  # there are no rows beyond


def test_nothing_is_had_before_the_first_adapter_and_without_rows():
    assert memory().ahead() == 0
    assert memory(rows=0).ahead() == 0
