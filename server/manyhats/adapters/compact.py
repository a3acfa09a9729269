"""An adapter's tensors in one memory mapping of their own.

As they are loaded, some are views of the file's bytes, which stay as long as one of them does,
beside the new tensors that others became: half as much again for a LoRA in the base's dtype. And
small allocations leave holes in the C library's heap when they go. A mapping holds just the
tensors, and goes back to the system with the last of them.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from manyhats.adapters.parts import CompiledAdapter, field_names

_ALIGN: Final = 64
"""Bytes of a cache line, at which each dtype's tensors begin."""


def compact(adapter: CompiledAdapter) -> CompiledAdapter:
    """The same adapter with all its tensors, bit by bit, in one anonymous mapping, one after the
    other by dtype.
    """
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for parts in adapter.sites.values():
        for tensor in parts.tensors():
            groups.setdefault(tensor.dtype, []).append(tensor)
    sizes = {dtype: sum(t.numel() for t in group) for dtype, group in groups.items()}
    size = sum(_aligned(count * dtype.itemsize) for dtype, count in sizes.items())
    if not size:
        return adapter
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a page fault for 2 MiB, not for 4 KiB
        memory.madvise(mmap.MADV_HUGEPAGE)
    copies: dict[int, torch.Tensor] = {}
    begin = 0
    for dtype, group in groups.items():
        if not sizes[dtype]:
            copies |= {id(t): t.clone() for t in group}
            continue
        flat = torch.frombuffer(memory, dtype=dtype, count=sizes[dtype], offset=begin)
        torch.cat([t.reshape(-1) for t in group], out=flat)
        pieces = flat.split_with_sizes([t.numel() for t in group])
        copies |= {id(t): p.view(t.shape) for t, p in zip(group, pieces, strict=True)}
        begin += _aligned(flat.nbytes)
    return replace(
        adapter, sites={name: _moved(parts, copies) for name, parts in adapter.sites.items()}
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _moved(part: Any, copies: Mapping[int, torch.Tensor]) -> Any:
    """A part, or a field of one, with the copies (by their tensors' ids) in its tensors' place."""
    if isinstance(part, torch.Tensor):
        return copies[id(part)]
    if isinstance(part, tuple):
        return tuple(_moved(item, copies) for item in part) if part else part
    values = {name: getattr(part, name) for name in field_names(type(part))}
    changed = {
        n: new for n, v in values.items() if v is not None and (new := _moved(v, copies)) is not v
    }
    return type(part)(**(values | changed)) if changed else part
