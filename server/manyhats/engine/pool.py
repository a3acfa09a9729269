"""The device tier of the adapters: rank rows per site, true to each adapter's own rank.

At a site, ``a`` is [rows, in] and ``b`` is [rows, out]; an adapter owns a run of rows at each site
where it has a low-rank part, and nothing elsewhere, so memory and arithmetic follow its true rank.
The other parts lie in ``engine.parts``; what they keep as whole tensors takes pages of one budget.
Who sits where is decided by ``adapters.slots.SlotTable``; this file only holds the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from manyhats.adapters.parts import CompiledAdapter, SiteKind, SiteParts, SiteSpec
from manyhats.engine.launches import LaunchTable
from manyhats.engine.parts.embedding import EmbeddingSite
from manyhats.engine.parts.norm import NormSite
from manyhats.engine.parts.prefix import PrefixSite
from manyhats.engine.parts.residual import ResidualSite
from manyhats.engine.parts.site import PoolConfig, Site, fields_of
from manyhats.engine.row_copies import copies_to
from manyhats.engine.row_memory import RowMemory
from manyhats.engine.site_pool import RowTable, SitePool
from manyhats.engine.step import StepState
from manyhats.errors import AdapterLoadError
from manyhats_kernels import Backend

OVERRIDE_PAGE = 1 << 16
"""Bytes of a page of the budget for whole tensors."""


_SITES: dict[SiteKind, Callable[[SiteSpec, PoolConfig], Site]] = {
    SiteKind.NORM: NormSite,
    SiteKind.EMBEDDING: EmbeddingSite,
    SiteKind.ATTENTION: PrefixSite,
    SiteKind.RESIDUAL: ResidualSite,
}
_LINEAR = frozenset({SiteKind.LINEAR, SiteKind.HEAD})
_PAGED = frozenset({SiteKind.LINEAR, SiteKind.HEAD, SiteKind.RESIDUAL})


class AdapterPool:
    """All sites' pools, which sites each slot uses, and what steps launch for them.

    ``override_bytes`` bounds what is kept as whole tensors (replaced rows, whole weights, prefixes,
    soft prompts), over all adapters on the device.
    """

    def __init__(
        self,
        sites: Sequence[SiteSpec],
        *,
        rows: int,
        slots: int,
        override_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        self.slots = slots
        self.rows = rows
        self._pages = override_bytes // OVERRIDE_PAGE
        config = PoolConfig(rows, slots, dtype, device, backend)
        self._rows = RowTable(len(sites), slots, device)
        linear = [spec for spec in sites if spec.kind is SiteKind.LINEAR]
        self._memory = RowMemory(linear, rows, dtype, device)
        self._copy = copies_to(device)
        self.sites: tuple[Site, ...] = tuple(
            SitePool(spec, config, self._rows.of_site(i), self._memory)
            if spec.kind in _LINEAR
            else _SITES[spec.kind](spec, config)
            for i, spec in enumerate(sites)
        )
        self._index = {site.spec.name: i for i, site in enumerate(self.sites)}
        paged = [site for site in self.sites if site.spec.kind in _PAGED]
        self._place = {site.spec.name: i for i, site in enumerate(paged)}
        self._sites_of_slot = [0] * slots
        self._outlines: list[CompiledAdapter | None] = [None] * slots  # without their tensors
        self._on_cpu = device.type == "cpu"
        self._others = 0  # bitmask of the slots that do more than multiply at linear layers
        self.launches = LaunchTable(slots)
        self._version = 0

    @property
    def sites_of_slot(self) -> Sequence[int]:
        """Bitmask of the sites that each slot's adapter uses."""
        return self._sites_of_slot

    @property
    def version(self) -> int:
        """Another number after every change of what a slot holds."""
        return self._version

    def rows_alone(self, state: StepState) -> bool:
        """Whether all that the worn adapters do is to multiply at linear layers by rank rows."""
        return not state.worn_slots & self._others

    @property
    def capacity(self) -> tuple[int, ...]:
        """Rows of each site that has rank rows, then the pages of the budget for whole tensors."""
        return (self.rows,) * len(self._place) + (self._pages,)

    def needs(self, adapter: CompiledAdapter) -> tuple[int, ...]:
        """What the adapter takes of each entry of ``capacity``.

        Raises AdapterLoadError for a part that cannot be served here and for whole tensors that are
        over the budget.
        """
        rows, whole = [0] * len(self._place), 0
        for name, parts in adapter.sites.items():
            site = self._site(name)
            site.check(parts)
            if name in self._place:
                rows[self._place[name]] = site.rows(parts)
            whole += site.whole_bytes(parts)
            if parts.prefix is not None and len(parts.prefix.k) != adapter.virtual_tokens:
                raise AdapterLoadError(
                    f"{name}: the prefix has {len(parts.prefix.k)} tokens and the adapter "
                    f"{adapter.virtual_tokens} virtual tokens"
                )
        pages = -(-whole // OVERRIDE_PAGE)
        if pages > self._pages:
            raise AdapterLoadError(
                f"the adapter's whole tensors (rows, dense weights, prefixes, soft prompts) take "
                f"{whole / 2**20:.1f} MiB, over the bound of {self._pages * OVERRIDE_PAGE >> 20} "
                "MiB (override_mb)"
            )
        return (*rows, pages)

    def write(self, slot: int, starts: Sequence[int], adapter: CompiledAdapter) -> None:
        """Brings an adapter to the device. Called beside the step loop, for a slot that nobody
        wears yet. ``starts``: where its share of each entry of ``capacity`` begins.

        What cannot be brought there whole leaves nothing behind.
        """
        self.clear(slot)
        products = all(self._is_product(name, parts) for name, parts in adapter.sites.items())
        try:
            if not products:
                self._others |= 1 << slot
            self.launches.write(
                slot, {name: self._site(name).launches(p) for name, p in adapter.sites.items()}
            )
            self._write_sites(slot, starts, adapter)
            runs = self._runs(starts, adapter)
            self._rows.write(slot, {self._index[name]: run for name, run in runs.items()})
            self._memory.wrote(runs)
        except BaseException:
            self.clear(slot)
            raise
        if products and self._on_cpu:
            named = (n for n, parts in adapter.sites.items() if parts.low_rank is not None)
            self._outlines[slot] = replace(adapter, sites=dict.fromkeys(named, SiteParts()))
        self._version += 1

    def ahead(self) -> None:
        """Gets ready for the next ``write`` what can be. Called beside the step loop, as that is,
        while an adapter is on its way from the disk.
        """
        self._memory.ahead()

    def holds_all(self, slot: int) -> bool:
        """Whether a slot's adapter can be read back: all of it is rank rows of linear layers, in
        the host's own memory.
        """
        return self._outlines[slot] is not None

    def read(self, slot: int) -> CompiledAdapter | None:
        """A slot's adapter again, or None without ``holds_all``. Its tensors are views of the rows,
        good until these are another's. Called beside the step loop, as ``write`` is.
        """
        outline = self._outlines[slot]
        if outline is None:
            return None
        read = {n: self.sites[self._index[n]] for n in outline.sites}
        return replace(
            outline, sites={n: s.read(slot) for n, s in read.items() if isinstance(s, SitePool)}
        )

    def clear(self, slot: int) -> None:
        """Forgets a slot's adapter. Its rows stay until overwritten, and nothing reads them."""
        used = self._sites_of_slot[slot]
        self._sites_of_slot[slot] = 0
        self._outlines[slot] = None
        for index, site in enumerate(self.sites):
            if used >> index & 1:
                site.clear(slot)
        self._rows.clear(slot)
        self._others &= ~(1 << slot)
        self.launches.clear(slot)
        self._version += 1

    def _write_sites(self, slot: int, starts: Sequence[int], adapter: CompiledAdapter) -> None:
        used = 0
        rows: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for name, parts in adapter.sites.items():
            index = self._index[name]
            used |= 1 << index
            self._sites_of_slot[slot] = used
            at = self._place.get(name)
            start = 0 if at is None else starts[at]
            site = self.sites[index]
            site.write(slot, start, parts)
            if parts.low_rank is not None and isinstance(site, SitePool):
                rows += site.places(start, parts.low_rank.rank)
                values += (parts.low_rank.a, parts.low_rank.b)
        self._copy(rows, values)

    def _runs(self, starts: Sequence[int], adapter: CompiledAdapter) -> dict[str, tuple[int, int]]:
        """The adapter's rank rows by a linear site's name."""
        return {
            name: (starts[self._place[name]], parts.low_rank.rank)
            for name, parts in adapter.sites.items()
            if parts.low_rank is not None and isinstance(self._site(name), SitePool)
        }

    def _is_product(self, name: str, parts: SiteParts) -> bool:
        """Whether a site's parts are rank rows at a linear layer and nothing else."""
        linear = self._site(name).spec.kind is SiteKind.LINEAR
        return linear and fields_of(parts) <= {"low_rank"}

    def _site(self, name: str) -> Site:
        index = self._index.get(name)
        if index is None:
            raise AdapterLoadError(f"{name} is no site of the base where an adapter can be served")
        return self.sites[index]
