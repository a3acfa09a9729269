"""Adapters that are to stay on the device, brought there without a request that asks for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from manyhats.adapters.slots import SlotTable
from manyhats.scheduler.residency import Admission, Failed, Pending
from manyhats.types import DEFAULT_TENANT, AdapterRef, Digest, SamplingParams, Sequence

logger = logging.getLogger(__name__)

_NOTHING: Final = SamplingParams(max_tokens=0, seed=0)


@dataclass(slots=True)
class _Pin:
    """``asker`` stands for a request in the line, older than all of them."""

    asker: Sequence
    settled: bool = False


class DevicePins:
    """Pins over a slot table, on the step thread. ``ask`` gets an adapter on its way, as
    ``AdapterResidency.prepare``; ``cancel`` gives up a place in its line.
    """

    def __init__(
        self,
        slots: SlotTable,
        ask: Callable[[Sequence], Admission],
        cancel: Callable[[Sequence], None],
    ) -> None:
        self._slots = slots
        self._ask = ask
        self._cancel = cancel
        self._pins: dict[Digest, _Pin] = {}
        self._tickets = 0
        self._unsettled = 0

    def pin(self, ref: AdapterRef) -> None:
        """Bring ``ref`` to the device as soon as there is room, and keep it."""
        if ref.digest not in self._pins:
            self._tickets -= 1
            asker = Sequence(self._tickets, "", 0, DEFAULT_TENANT, _NOTHING, ref, 0.0, 0, [])
            self._pins[ref.digest] = _Pin(asker)
            self._unsettled += 1
            self.advance()

    def forget(self, digest: Digest) -> bool:
        """The adapter need not stay any longer; whether it is pinned on the device."""
        pin = self._pins.pop(digest, None)
        if pin is None:
            return False
        if not pin.settled:
            self._unsettled -= 1
            self._cancel(pin.asker)
        return pin.settled

    def unpin(self, ref: AdapterRef) -> None:
        """``ref`` may go again."""
        if self.forget(ref.digest):
            self._slots.unpin(ref.digest)

    def advance(self) -> None:
        """Something may have come, or made room: see after those that are not there yet."""
        if not self._unsettled:
            return
        for digest, pin in list(self._pins.items()):
            if pin.settled:
                continue
            answer = self._ask(pin.asker)
            if isinstance(answer, Pending):
                continue
            pin.settled = True
            self._unsettled -= 1
            if isinstance(answer, Failed):
                logger.error(
                    "%s is pinned and cannot be: %s", pin.asker.adapter, answer.error.message
                )
                del self._pins[digest]
            else:
                self._slots.pin(digest)
                self._cancel(pin.asker)
