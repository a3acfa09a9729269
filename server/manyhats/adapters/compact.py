"""An adapter's tensors in one memory mapping of their own.

As they are loaded, some are views of the file's bytes, which stay as long as one of them does,
beside the new tensors that others became: half as much again for a LoRA in the base's dtype. And
small allocations leave holes in the C library's heap when they go. A mapping holds just the
tensors, and goes back to the system with the last of them.
"""

from __future__ import annotations

import mmap
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final

import torch

from manyhats.adapters.parts import CompiledAdapter

_ALIGN: Final = 64
"""Bytes of a cache line."""


def compact(adapter: CompiledAdapter) -> CompiledAdapter:
    """The same adapter with all its tensors, bit by bit, in one anonymous mapping."""
    tensors = [t for parts in adapter.sites.values() for t in parts.tensors()]
    size = sum(_aligned(t) for t in tensors)
    if not size:
        return adapter
    room = _Room(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
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
        if isinstance(part, tuple):
            return tuple(self.moved(item) for item in part)
        if not is_dataclass(part) or isinstance(part, type):
            return part
        values = {item.name: getattr(part, item.name) for item in fields(part)}
        changed = {n: self.moved(v) for n, v in values.items() if _holds(v)}
        return replace(part, **changed) if changed else part

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return tensor.clone()
        flat = torch.frombuffer(
            self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._used
        )
        self._used += _aligned(tensor)
        return flat.view(tensor.shape).copy_(tensor)


def _holds(value: object) -> bool:
    """Whether a field may hold tensors."""
    return isinstance(value, torch.Tensor | tuple) or is_dataclass(value)
