"""What decode steps launch for the adapters they wear: which steps one CUDA graph can stand for."""

from __future__ import annotations

from collections.abc import Mapping

from manyhats.engine.step import StepState


class LaunchTable:
    """By slot, what its adapter makes a decode step launch (``Site.launches``).

    Written on the loader's thread, for slots that no running step wears; read on the step thread.
    """

    __slots__ = ("_bits", "_of_slot", "_on_host")

    def __init__(self, slots: int) -> None:
        self._bits: dict[tuple[str, str], int] = {}
        self._of_slot = [0] * slots
        self._on_host = 0

    def write(self, slot: int, launched: Mapping[str, frozenset[str] | None]) -> None:
        """Notes a slot's adapter. ``launched``: by site; None is what the host has to handle."""
        self.clear(slot)
        for site, names in launched.items():
            if names is None:
                self._on_host |= 1 << slot
                continue
            for name in names:
                bit = self._bits.setdefault((site, name), 1 << len(self._bits))
                self._of_slot[slot] |= bit

    def clear(self, slot: int) -> None:
        """Forgets a slot's adapter."""
        self._of_slot[slot] = 0
        self._on_host &= ~(1 << slot)

    def of(self, state: StepState) -> int | None:
        """What the running step launches for its adapters if it is one of decodes alone.

        Steps of the same number launch the same, so that a graph of one is a graph of all. None
        where no graph can be: a worn adapter has parts that the host takes one adapter at a time,
        or tokens of the step are virtual.
        """
        worn = state.worn_slots
        if worn & self._on_host or state.virtual:
            return None
        launches = 0
        for slot in state.adapters.worn:
            launches |= self._of_slot[slot]
        return launches
