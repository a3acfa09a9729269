"""The device tier of the adapters: rank rows per site, true to each adapter's own rank.

At a site, ``a`` is [rows, in] and ``b`` is [rows, out]; an adapter owns a run of rows at each site
where it has a low-rank part, and nothing elsewhere, so memory and arithmetic follow its true rank.
Who sits where is decided by ``adapters.slots.SlotTable``; this file only holds the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manyhats.adapters.parts import CompiledAdapter, SiteKind, SiteParts, SiteSpec
from manyhats.engine.step import StepState
from manyhats_kernels import Backend, SiteRows


class SitePool:
    """One site's rows, and the product with them. Reads happen on the step thread, writes on the
    loader's.

    A writer touches only the rows of a slot that no running step wears. ``bias`` ([slots, out])
    comes into being with the first adapter that has one here.
    """

    __slots__ = (
        "_a",
        "_b",
        "_backend",
        "_bias",
        "_bias_slots",
        "_row_slots",
        "_rows",
        "_slots",
        "spec",
    )

    def __init__(
        self,
        spec: SiteSpec,
        *,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        self.spec = spec
        # torch.empty: on a CPU the pages cost nothing until an adapter is written to them.
        self._a = torch.empty((rows, spec.in_features), dtype=dtype, device=device)
        self._b = torch.empty((rows, spec.out_features), dtype=dtype, device=device)
        self._rows = SiteRows(
            start=torch.zeros(slots, dtype=torch.int32, device=device),
            count=torch.zeros(slots, dtype=torch.int32, device=device),
        )
        self._bias: torch.Tensor | None = None
        self._row_slots = 0
        self._bias_slots = 0
        self._slots = slots
        self._backend = backend

    def write(self, slot: int, start: int, parts: SiteParts) -> None:
        """Copies the parts to the device; ``start`` is the first row of the slot's run here."""
        low_rank = parts.low_rank
        if low_rank is not None:
            stop = start + low_rank.rank
            self._a[start:stop].copy_(low_rank.a)
            self._b[start:stop].copy_(low_rank.b)
            self._rows.start[slot] = start
            self._rows.count[slot] = low_rank.rank
            self._row_slots |= 1 << slot
        if parts.bias is not None:
            if self._bias is None:
                self._bias = torch.zeros(
                    (self._slots, self.spec.out_features),
                    dtype=self._b.dtype,
                    device=self._b.device,
                )
            self._bias[slot].copy_(parts.bias)
            self._bias_slots |= 1 << slot

    def clear(self, slot: int) -> None:
        """Forgets the slot's run; its rows may then be given to another."""
        self._row_slots &= ~(1 << slot)
        self._rows.count[slot] = 0
        if self._bias is not None and self._bias_slots >> slot & 1:
            self._bias_slots &= ~(1 << slot)
            self._bias[slot].zero_()

    def launches(self, state: StepState) -> int:
        """What ``apply`` will launch in the step that is running: bit 0 rows, bit 1 a bias."""
        rows = bool(self._row_slots & state.worn_slots)
        return rows + 2 * (self._bias is not None and bool(self._bias_slots & state.worn_slots))

    def apply(self, x: torch.Tensor, y: torch.Tensor, state: StepState) -> None:
        """y[t] += (x[t] A^T) B + bias for each token that wears an adapter with parts here, in
        place.

        x: [T, in]; y: [T, out]; the pool's dtype.
        """
        if self._row_slots & state.worn_slots:
            self._backend.lora_add(y, x, self._a, self._b, self._rows, state.adapters)
        if self._bias is not None and self._bias_slots & state.worn_slots:
            self._backend.bias_add(y, self._bias, state.adapters)


class AdapterPool:
    """All sites' pools, and which sites each slot uses."""

    def __init__(
        self,
        sites: Sequence[SiteSpec],
        *,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        self.slots = slots
        self.rows = rows
        self.sites = tuple(
            SitePool(s, rows=rows, slots=slots, dtype=dtype, device=device, backend=backend)
            for s in sites
        )
        self._index = {site.spec.name: i for i, site in enumerate(self.sites)}
        self._sites_of_slot = [0] * slots

    @property
    def sites_of_slot(self) -> Sequence[int]:
        """Bitmask of the sites that each slot's adapter uses."""
        return self._sites_of_slot

    def launches(self, state: StepState) -> tuple[int, ...]:
        """What each site launches in the step that is running; empty where nobody wears anything.

        Two steps of as many tokens that agree in it launch the same kernels on the same memory.
        """
        if not state.active_sites:
            return ()
        return tuple(site.launches(state) for site in self.sites)

    def ranks(self, adapter: CompiledAdapter) -> tuple[int, ...]:
        """Rows that the adapter needs at each site (0 where it has no low-rank part)."""
        return tuple(
            parts.low_rank.rank
            if (parts := adapter.sites.get(site.spec.name)) is not None
            and parts.low_rank is not None
            else 0
            for site in self.sites
        )

    def write(self, slot: int, starts: Sequence[int], adapter: CompiledAdapter) -> None:
        """Brings an adapter to the device. Called beside the step loop, for a slot that nobody
        wears yet.
        """
        used = 0
        for name, parts in adapter.sites.items():
            index = self._index[name]
            self.sites[index].write(slot, starts[index], parts)
            used |= 1 << index
        self._sites_of_slot[slot] = used

    def clear(self, slot: int) -> None:
        """Forgets a slot's adapter (its bytes stay until overwritten; nothing reads them)."""
        used = self._sites_of_slot[slot]
        self._sites_of_slot[slot] = 0
        for index, site in enumerate(self.sites):
            if used >> index & 1:
                site.clear(slot)


def adaptable(spec: SiteSpec) -> bool:
    """Whether parts can be served at the site: linear layers, and norms that have a bias."""
    return spec.kind is SiteKind.LINEAR or (spec.kind is SiteKind.NORM and spec.bias is not None)
