"""The device tier of the adapters: rank rows per site, true to each adapter's own rank.

At a site, ``a`` is [rows, in] and ``b`` is [rows, out]; an adapter owns a run of rows at each site
where it has a low-rank part, and nothing elsewhere, so memory and arithmetic follow its true rank.
The other parts lie in ``engine.parts``; what they keep as whole tensors takes pages of one budget.
Who sits where is decided by ``adapters.slots.SlotTable``; this file only holds the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from manyhats.adapters.parts import CompiledAdapter, LowRank, SiteKind, SiteParts, SiteSpec
from manyhats.engine.launches import LaunchTable
from manyhats.engine.parts.embedding import EmbeddingSite
from manyhats.engine.parts.linear import LinearExtras
from manyhats.engine.parts.norm import NormSite
from manyhats.engine.parts.prefix import PrefixSite
from manyhats.engine.parts.residual import ResidualSite
from manyhats.engine.parts.site import PoolConfig, Site, fields_of
from manyhats.engine.step import StepState
from manyhats.errors import AdapterLoadError
from manyhats_kernels import AdapterBatch, Backend, SiteRows
from manyhats_kernels.groups import SiteGroup, SiteWeights

_ALIGNED = 4
"""Numbers of 16 bytes: where a site's part of the table of rows begins, as kernels want it."""
OVERRIDE_PAGE = 1 << 16
"""Bytes of a page of the budget for whole tensors."""


class SitePool:
    """The rows of a linear site or the head, and the product with them.

    ``extras`` holds all other parts; ``rows``, who owns which rows, is written by the whole pool
    for all sites at once. Reads happen on the step thread, writes on the loader's; a
    writer touches only the rows of a slot that no running step wears. The head's pool comes into
    being with the first adapter that has rows there.
    """

    __slots__ = ("_a", "_b", "_backend", "_config", "_row_slots", "_rows", "extras", "spec")

    def __init__(self, spec: SiteSpec, config: PoolConfig, rows: SiteRows) -> None:
        self.spec = spec
        self.extras = LinearExtras(spec, config)
        self._config = config
        self._rows = rows
        self._row_slots = 0
        self._backend = config.backend
        self._allocate(0 if spec.kind is SiteKind.HEAD else config.rows)

    def check(self, parts: SiteParts) -> None:
        """See ``Site.check``."""
        self.extras.check(parts)

    def rows(self, parts: SiteParts) -> int:
        """See ``Site.rows``."""
        return parts.low_rank.rank if parts.low_rank is not None else 0

    def whole_bytes(self, parts: SiteParts) -> int:
        """See ``Site.whole_bytes``."""
        return self.extras.whole_bytes(parts)

    def launches(self, parts: SiteParts) -> frozenset[str] | None:
        """See ``Site.launches``."""
        return self.extras.launches(parts)

    def write(self, slot: int, start: int, parts: SiteParts) -> None:
        """See ``Site.write``."""
        low_rank = parts.low_rank
        if low_rank is not None:
            if not self._a.shape[0]:
                self._allocate(self._config.rows)
            stop = start + low_rank.rank
            self._a[start:stop].copy_(low_rank.a)
            self._b[start:stop].copy_(low_rank.b)
            self._row_slots |= 1 << slot
        self.extras.write(slot, parts)

    def read(self, slot: int) -> SiteParts:
        """What the slot has here, of its rank rows alone; views, until another has the rows."""
        start = int(self._rows.start[slot])
        stop = start + int(self._rows.count[slot])
        return SiteParts(LowRank(self._a[start:stop], self._b[start:stop]))

    def clear(self, slot: int) -> None:
        """See ``Site.clear``."""
        self._row_slots &= ~(1 << slot)
        self.extras.clear(slot)

    def apply(
        self, x: torch.Tensor, y: torch.Tensor, batch: AdapterBatch, state: StepState
    ) -> None:
        """y[t] += (x[t] A^T) B for each token that wears an adapter with rows here, in place.

        x: [T, in]; y: [T, out]; the pool's dtype.
        """
        if self._row_slots & state.worn_slots:
            self._backend.lora_add(y, x, self._a, self._b, self._rows, batch)

    @property
    def row_slots(self) -> int:
        """Bitmask of the slots that own rows here."""
        return self._row_slots

    @property
    def weights(self) -> SiteWeights:
        """The pools and who owns which rows."""
        return SiteWeights(self._a, self._b, self._rows)

    def _allocate(self, rows: int) -> None:
        # torch.empty: on a CPU the pages cost nothing until an adapter is written to them.
        spec, config = self.spec, self._config
        self._a = torch.empty((rows, spec.in_features), dtype=config.dtype, device=config.device)
        self._b = torch.empty((rows, spec.out_features), dtype=config.dtype, device=config.device)


class RowTable:
    """Which rank rows each slot owns at each linear site: one tensor for all sites, since hundreds
    of single numbers cost a call, on a GPU a launch, each.
    """

    __slots__ = ("_values",)

    def __init__(self, sites: int, slots: int, device: torch.device) -> None:
        width = -(-slots // _ALIGNED) * _ALIGNED
        self._values = torch.zeros((sites, 2, width), dtype=torch.int32, device=device)
        self._values = self._values[..., :slots]

    def of_site(self, index: int) -> SiteRows:
        """The table's part of one site, as kernels take it."""
        start, count = self._values[index]
        return SiteRows(start=start, count=count)

    def write(self, slot: int, runs: Mapping[int, tuple[int, int]]) -> None:
        """Sets the slot's runs: a site's index to (start, count)."""
        column = torch.zeros(self._values.shape[:2], dtype=torch.int32)
        if runs:
            column[list(runs)] = torch.tensor(list(runs.values()), dtype=torch.int32)
        self._values[..., slot].copy_(column)

    def clear(self, slot: int) -> None:
        """The slot owns nothing."""
        self._values[..., slot].zero_()


class PoolGroup:
    """The pools of linear sites that read the same input, applied in one call."""

    __slots__ = ("_backend", "_group", "_pools")

    def __init__(self, pools: Sequence[SitePool], backend: Backend) -> None:
        self._pools = tuple(pools)
        self._backend = backend
        # The head's rows come into being later: it is alone, and takes its own way.
        head = any(pool.spec.kind is SiteKind.HEAD for pool in pools)
        self._group = None if head else SiteGroup([pool.weights for pool in pools])

    @property
    def sites(self) -> SiteGroup | None:
        """The pools as kernels take them; None where they cannot be taken together."""
        return self._group

    def worn(self, state: StepState) -> list[bool]:
        """Of each member, whether a worn adapter has rows there."""
        return [bool(pool.row_slots & state.worn_slots) for pool in self._pools]

    def must_run_alone(self, state: StepState) -> bool:
        """Whether the members must be computed one by one: a worn adapter changes the input or
        stands in for a weight.
        """
        if self._group is None:
            return True
        worn = state.worn_slots
        return any(pool.extras.slots & worn and pool.extras.before(state) for pool in self._pools)

    def apply(self, x: torch.Tensor, ys: Sequence[torch.Tensor], state: StepState) -> None:
        """Every member's parts added to its y, in place. x: [..., in]; ys: [..., out] each."""
        if self._group is not None and any(self.worn(state)):
            flat = [y.view(-1, y.shape[-1]) for y in ys]
            x = x.reshape(-1, x.shape[-1])
            self._backend.lora_add_group(flat, x, self._group, state.adapters)
        self.finish(ys, state)

    def finish(self, ys: Sequence[torch.Tensor], state: StepState) -> None:
        """Every member's scales and biases put to its y, in place. ys: [..., out] each."""
        for pool, y in zip(self._pools, ys, strict=True):
            if pool.extras.slots & state.worn_slots:
                pool.extras.finish(y.view(-1, y.shape[-1]), state.adapters, state)


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
        self.sites: tuple[Site, ...] = tuple(
            SitePool(spec, config, self._rows.of_site(i))
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
        used = 0
        products = all(self._is_product(name, parts) for name, parts in adapter.sites.items())
        try:
            if not products:
                self._others |= 1 << slot
            self.launches.write(
                slot, {name: self._site(name).launches(p) for name, p in adapter.sites.items()}
            )
            for name, parts in adapter.sites.items():
                used |= 1 << self._index[name]
                self._sites_of_slot[slot] = used
                at = self._place.get(name)
                self.sites[self._index[name]].write(slot, 0 if at is None else starts[at], parts)
            self._rows.write(slot, self._runs(starts, adapter))
        except BaseException:
            self.clear(slot)
            raise
        if products and self._on_cpu:
            named = (n for n, parts in adapter.sites.items() if parts.low_rank is not None)
            self._outlines[slot] = replace(adapter, sites=dict.fromkeys(named, SiteParts()))
        self._version += 1

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

    def _runs(self, starts: Sequence[int], adapter: CompiledAdapter) -> dict[int, tuple[int, int]]:
        """The adapter's rank rows by a linear site's index."""
        return {
            self._index[name]: (starts[self._place[name]], parts.low_rank.rank)
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
