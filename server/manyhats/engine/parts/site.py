"""What every kind of site has in common: where tensors lie, and vectors that each slot has one of.

Reads happen on the step thread, writes on the loader's; a writer touches only what belongs to a
slot that no running step wears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Final, Protocol

import torch

from manyhats.adapters.parts import SiteParts, SiteSpec
from manyhats.engine.step import StepState
from manyhats.errors import AdapterLoadError
from manyhats_kernels import Backend
from manyhats_kernels.stack_parts import VectorRows

_FIELDS: Final = tuple(item.name for item in fields(SiteParts))
_VALUES: Final = attrgetter(*_FIELDS)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The pools' sizes (``rows`` rank rows a site, ``slots`` adapters) and where they lie."""

    rows: int
    slots: int
    dtype: torch.dtype
    device: torch.device
    backend: Backend

    def place(self, tensor: torch.Tensor, shape: Sequence[int], what: str) -> torch.Tensor:
        """The tensor on the device. Raises AdapterLoadError where its shape is another."""
        if tuple(tensor.shape) != tuple(shape):
            raise AdapterLoadError(
                f"{what} has the shape {tuple(tensor.shape)}: {tuple(shape)} is needed"
            )
        return tensor.to(self.device, self.dtype).contiguous()


class Site(Protocol):
    """One site's share of the device: what each slot's adapter does there."""

    @property
    def spec(self) -> SiteSpec:
        """The site in the base model."""

    def check(self, parts: SiteParts) -> None:
        """Raises AdapterLoadError for parts that cannot be served here."""

    def rows(self, parts: SiteParts) -> int:
        """Rank rows that the parts need."""

    def whole_bytes(self, parts: SiteParts) -> int:
        """Bytes of what is kept as whole tensors, which the budget of overrides bounds."""

    def launches(self, parts: SiteParts) -> frozenset[str] | None:
        """Names for what a decode step launches here for an adapter with these parts.

        Together, the names of all worn adapters decide what is launched. None where the host
        looks at who wears what, so that no CUDA graph can hold it.
        """

    def write(self, slot: int, start: int, parts: SiteParts) -> None:
        """Brings the parts to the device; ``start`` is the first row of the slot's run here."""

    def clear(self, slot: int) -> None:
        """Forgets the slot's parts; all that they took may then be given to another."""


def fields_of(parts: SiteParts) -> set[str]:
    """The names of the parts that are there."""
    values = _VALUES(parts)
    # No comparison with (): a tensor would be compared value by value.
    return {
        name
        for name, value in zip(_FIELDS, values, strict=True)
        if value is not None and not (value.__class__ is tuple and not value)
    }


def refuse_others(parts: SiteParts, spec: SiteSpec, served: frozenset[str]) -> None:
    """Raises AdapterLoadError, naming the field, for a part that is not among ``served``."""
    others = fields_of(parts) - served
    for name in sorted(others) if others else ():
        raise AdapterLoadError(
            f"{spec.name}: {name} is no part that a site of the kind {spec.kind.value} has"
        )


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class SlotVectors:
    """One vector a slot, [slots, size]; it comes into being with the first adapter that has one.

    ``neutral`` is what a slot without one holds, and changes no bit: 1 for a factor, -0.0 for a
    term. ``slots`` is the bitmask of those that have one, ``has`` [slots] the same as int32.
    """

    __slots__ = ("_config", "_neutral", "_size", "has", "slots", "values")

    def __init__(self, config: PoolConfig, size: int, neutral: float) -> None:
        self._config = config
        self._size = size
        self._neutral = neutral
        self.slots = 0
        self.values = torch.empty((0, size), dtype=config.dtype, device=config.device)
        self.has = torch.empty(0, dtype=torch.int32, device=config.device)

    def write(self, slot: int, vector: torch.Tensor | None) -> None:
        """Sets the slot's vector; None leaves it without."""
        if vector is None:
            return
        config = self._config
        if not len(self.values):
            self.has = torch.zeros(config.slots, dtype=torch.int32, device=config.device)
            self.values = torch.full(
                (config.slots, self._size), self._neutral, dtype=config.dtype, device=config.device
            )
        self.values[slot].copy_(vector)
        self.has[slot] = 1
        self.slots |= 1 << slot

    def clear(self, slot: int) -> None:
        """Leaves the slot without a vector."""
        if self.slots >> slot & 1:
            self.slots &= ~(1 << slot)
            self.values[slot].fill_(self._neutral)
            self.has[slot] = 0

    @property
    def rows(self) -> VectorRows | None:
        """The pool as kernels take it, None before the first adapter."""
        return VectorRows(self.values, self.has) if len(self.values) else None

    def worn(self, state: StepState) -> bool:
        """Whether an adapter of the running step has one."""
        return bool(self.slots & state.worn_slots)
