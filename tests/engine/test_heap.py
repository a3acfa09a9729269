"""What is free in the C library's heap goes back to the system, where the library can do that."""

from __future__ import annotations

import ctypes
import platform
import sys

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine import heap
from manyhats.engine.heap import give_back

MIB = 1 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_free_memory_below_what_is_in_use_goes_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 1 << 16, 1024  # small enough for the heap; 64 MiB
    pieces = [libc.malloc(size) for _ in range(count)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces[:-1]:  # the last one is in the way of the heap's end
        libc.free(piece)
    before = psutil.Process().memory_info().rss
    assert give_back()
    assert before - psutil.Process().memory_info().rss > 48 * MIB
    libc.free(pieces[-1])


@given(st.lists(st.integers(0, 50), max_size=40))
def test_it_is_given_back_once_for_so_many_bytes(sizes):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heap, "give_back", lambda: calls.append(None))
        trimmer, since = heap.Trimmer(100), 0
        for size in sizes:
            before = len(calls)
            trimmer.loaded(size)
            since += size
            assert len(calls) - before == (since >= 100)
            since = 0 if since >= 100 else since


@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_another_c_library_is_left_alone(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert not give_back()
