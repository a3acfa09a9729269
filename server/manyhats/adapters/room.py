"""The room on the device, as geometry alone: slots, and a pool of rank rows at each site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from manyhats.adapters.rows import RowAllocator, largest_run
from manyhats.errors import AdapterLoadError


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter is: in ``slot``, ``ranks[i]`` rows from ``starts[i]`` on at site i.

    ``starts[i]`` is 0 where the adapter needs no row.
    """

    slot: int
    ranks: tuple[int, ...]
    starts: tuple[int, ...]


class Room:
    """``num_slots`` slots and ``rows_per_site[i]`` rows at site i; hundreds of sites are cheap."""

    __slots__ = ("_free_slots", "_gaps", "_pinned", "_sites", "num_slots")

    def __init__(self, num_slots: int, rows_per_site: Sequence[int]) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {num_slots}")
        self.num_slots = num_slots
        self._free_slots = list(range(num_slots))
        self._sites = tuple(RowAllocator(rows) for rows in rows_per_site)
        self._pinned: tuple[Placement, ...] = ()
        self._gaps = [site.rows for site in self._sites]  # longest run that no pin cuts

    @property
    def used_rows(self) -> tuple[int, ...]:
        """Rows in use at each site."""
        return tuple(site.used_rows for site in self._sites)

    def take(self, ranks: tuple[int, ...]) -> Placement:
        """Place an adapter for which ``fewest`` found room. Raises SlotStateError without it."""
        starts = tuple(
            site.take(rank) if rank else 0 for site, rank in zip(self._sites, ranks, strict=True)
        )
        return Placement(heappop(self._free_slots), ranks, starts)

    def give(self, place: Placement) -> None:
        """Take a place back."""
        for site, start, rank in zip(self._sites, place.starts, place.ranks, strict=True):
            if rank:
                site.give(start, rank)
        heappush(self._free_slots, place.slot)

    def fewest(
        self, ranks: Sequence[int], candidates: Sequence[Placement]
    ) -> tuple[Placement, ...] | None:
        """Who must go so that the ranks fit; candidates come in the order in which they should go.

        Nobody if there is room; else one, the first that will do; else a set that none can be left
        out of. None: all of them are not enough.
        """
        sites = self._tight_sites(ranks, candidates)
        if self._free_slots and not sites:
            return ()

        def enough(chosen: Sequence[Placement]) -> bool:
            return all(
                self._sites[i].fits(ranks[i], [(p.starts[i], p.ranks[i]) for p in chosen])
                for i in sites
            )

        for candidate in candidates:
            if enough((candidate,)):
                return (candidate,)
        for count in range(2, len(candidates) + 1):
            if enough(candidates[:count]):
                chosen = list(candidates[:count])
                break
        else:
            return None
        for place in reversed(chosen[:-1]):  # spare whom the later ones made superfluous
            fewer = [p for p in chosen if p is not place]
            if enough(fewer):
                chosen = fewer
        return tuple(chosen)

    def set_pinned(self, places: Iterable[Placement]) -> None:
        """Tell which places will not be given back for now."""
        self._pinned = tuple(places)
        for i, site in enumerate(self._sites):
            edge = 0
            gaps = []
            for start, count in sorted((p.starts[i], p.ranks[i]) for p in self._pinned):
                if count:
                    gaps.append(start - edge)
                    edge = start + count
            self._gaps[i] = max([*gaps, site.rows - edge])

    def check_possible(self, ranks: Sequence[int]) -> None:
        """Raise AdapterLoadError if the ranks would not fit even with everything unpinned gone."""
        if len(ranks) != len(self._sites):
            raise ValueError(f"ranks has {len(ranks)} entries for {len(self._sites)} sites")
        rows = zip(ranks, self._sites, self._gaps, strict=True)
        for index, (rank, site, gap) in enumerate(rows):
            if rank < 0:
                raise ValueError(f"ranks[{index}] must be at least 0, not {rank}")
            if rank <= gap:
                continue
            need = f"The adapter needs {rank} rank rows at site {index}, and the pool "
            if rank > site.rows:
                raise AdapterLoadError(f"{need}has {site.rows} there.")
            raise AdapterLoadError(
                f"{need}of {site.rows} has only {gap} together that pinned adapters leave free."
            )
        if len(self._pinned) >= self.num_slots:
            raise AdapterLoadError(f"Pinned adapters hold all {self.num_slots} slots.")

    def check_invariants(self, places: Iterable[Placement]) -> None:
        """Raise RuntimeError unless these places and the free room make up the whole, once each."""
        held = tuple(places)
        slots = sorted([*self._free_slots, *(p.slot for p in held)])
        if slots != list(range(self.num_slots)):
            raise RuntimeError(f"slots do not add up: {slots}")
        for i, site in enumerate(self._sites):
            runs = [(p.starts[i], p.ranks[i]) for p in held if p.ranks[i]]
            runs += site.runs
            total = sum(count for _, count in runs)
            if total != site.rows or (runs and largest_run(runs) != site.rows):
                raise RuntimeError(f"rows of site {i} do not add up: {sorted(runs)}")

    def _tight_sites(self, ranks: Sequence[int], candidates: Sequence[Placement]) -> list[int]:
        """Sites where the rank does not fit now, one for each different layout.

        Most sites look alike (an adapter mostly has one rank), so one of a kind is enough to try.
        """
        starts = list(zip(*(p.starts for p in candidates), strict=True))
        counts = list(zip(*(p.ranks for p in candidates), strict=True))
        kinds: dict[object, int] = {}
        for i, rank in enumerate(ranks):
            if rank and not self._sites[i].fits(rank):
                runs = (starts[i], counts[i]) if candidates else ()
                kinds.setdefault((rank, self._sites[i].runs, runs), i)
        return list(kinds.values())
