"""What adapters hold: seconds on the device, counted for their owners, and bytes at rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from manyhats.lifecycle.registry import Registry
from manyhats.tenancy.repeating import repeating
from manyhats.types import AdapterRef

PERIOD_S: Final = 5.0
"""How often it is looked what is on the device: each that is there then counts for the whole."""

Count = Callable[[str, str, int], None]
"""Told the owner, the adapter's name, and the seconds."""

Sized = Callable[[Mapping[str, int]], None]
"""Told the bytes of every adapter, by name."""


class Occupancy:
    """``resident`` gives what is on the device, ``count`` is told of it, ``sized`` of what lies
    on the disk; ``clock`` in seconds.

    What a request composed of others' adapters is no name's, and counts for nobody.
    """

    def __init__(
        self,
        registry: Registry,
        resident: Callable[[], Iterable[AdapterRef]],
        count: Count,
        sized: Sized,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._resident = resident
        self._count = count
        self._sized = sized
        self._clock = clock
        self._counted = clock()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts on a thread of its own until the block ends, and then once more."""
        try:
            with repeating(self.tick, PERIOD_S, "occupancy"):
                yield
        finally:
            self.tick()

    def tick(self) -> None:
        """Count the whole seconds since the last time for the names that are there now."""
        seconds = int(self._clock() - self._counted)
        if not seconds:
            return
        self._counted += seconds
        for name in {ref.name for ref in self._resident()}:
            entry = self._registry.entry(name)
            if entry is not None:
                self._count(entry.owner, name, seconds)
        self._sized({name or "": size for (_, name), size in self.sizes().items()})

    def sizes(self) -> Mapping[tuple[str, str | None], int]:
        """Bytes of each name's versions by owner and name; compositions have none of their own."""
        found: dict[tuple[str, str | None], int] = {}
        for entry in self._registry.entries():
            sizes = [r.nbytes for r in entry.versions if r.ref.composition is None]
            if sizes:
                found[entry.owner, entry.name] = sum(sizes)
        return found
