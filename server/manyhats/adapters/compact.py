"""An adapter's tensors in one memory mapping of their own.

As they are loaded, some are views of the file's bytes, which stay as long as one of them does,
beside the new tensors that others became: half as much again for a LoRA in the base's dtype. And
small allocations leave holes in the C library's heap when they go. A mapping holds just the
tensors, and goes back to the system with the last of them.
"""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any, Final

import torch

from manyhats.adapters.parts import CompiledAdapter, field_names

_ALIGN: Final = 64
"""Bytes of a cache line."""


def compact(adapter: CompiledAdapter) -> CompiledAdapter:
    """The same adapter with all its tensors, bit by bit, in one anonymous mapping."""
    tensors = [t for parts in adapter.sites.values() for t in parts.tensors()]
    size = sum(_aligned(t) for t in tensors)
    if not size:
        return adapter
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a page fault for 2 MiB, not for 4 KiB
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = _Room(memory)
    sites = {name: room.moved(parts) for name, parts in adapter.sites.items()}
    return replace(adapter, sites=sites)


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN


class _Room:
    """Gives out a mapping from its start on. The tensors on it keep it alive."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._used = 0

    def moved(self, part: Any) -> Any:
        """A part, or a field of one, with its tensors copied here."""
        if isinstance(part, torch.Tensor):
            return self._copy(part)
        if part is None:
            return part
        if isinstance(part, tuple):
            return tuple(self.moved(item) for item in part) if part else part
        values = {name: getattr(part, name) for name in field_names(type(part))}
        changed = {n: new for n, v in values.items() if (new := self.moved(v)) is not v}
        return type(part)(**(values | changed)) if changed else part

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return tensor.clone()
        flat = torch.frombuffer(
            self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._used
        )
        self._used += _aligned(tensor)
        return flat.view(tensor.shape).copy_(tensor)
