"""One linear site's part of the device tier: its rank rows, who owns which, and the products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from manyhats.adapters.parts import LowRank, SiteKind, SiteParts, SiteSpec
from manyhats.engine.parts.linear import LinearExtras
from manyhats.engine.parts.site import PoolConfig
from manyhats.engine.row_memory import RowMemory
from manyhats.engine.step import StepState
from manyhats_kernels import AdapterBatch, Backend, SiteRows
from manyhats_kernels.groups import SiteGroup, SiteWeights

_ALIGNED = 4
"""Numbers of 16 bytes: where a site's part of the table of rows begins, as kernels want it."""


class SitePool:
    """The rows of a linear site or the head, and the product with them.

    ``extras`` holds all other parts; ``rows``, who owns which rows, is written by the whole pool
    for all sites at once, as the values of the rows are, which lie in ``memory``. Reads happen on
    the step thread, writes on the loader's; a writer touches only the rows of a slot that no
    running step wears. The head's pool comes into being with the first adapter that has rows there.
    """

    __slots__ = ("_a", "_b", "_backend", "_config", "_row_slots", "_rows", "extras", "spec")

    def __init__(
        self, spec: SiteSpec, config: PoolConfig, rows: SiteRows, memory: RowMemory
    ) -> None:
        self.spec = spec
        self.extras = LinearExtras(spec, config)
        self._config = config
        self._rows = rows
        self._row_slots = 0
        self._backend = config.backend
        if spec.kind is SiteKind.HEAD:
            self._allocate(0)
        else:
            self._a, self._b = memory.of(spec.name)

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
        """See ``Site.write``; the values of rank rows go to ``places``."""
        if parts.low_rank is not None:
            if not self._a.shape[0]:
                self._allocate(self._config.rows)
            self._row_slots |= 1 << slot
        self.extras.write(slot, parts)

    def places(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A's and B's rows of a run, which the whole pool writes for all sites at once."""
        stop = start + count
        return self._a[start:stop], self._b[start:stop]

    def read(self, slot: int) -> SiteParts:
        """What the slot has here, of its rank rows alone; views, until another has the rows."""
        start, count = int(self._rows.start[slot]), int(self._rows.count[slot])
        return SiteParts(LowRank(*self.places(start, count)))

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
