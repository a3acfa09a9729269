"""What the scheduler asks of whoever brings adapters to the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from manyhats.errors import ManyhatsError
from manyhats.types import Sequence


@dataclass(frozen=True, slots=True)
class Ready:
    """The adapter is on the device in ``slot``."""

    slot: int


@dataclass(frozen=True, slots=True)
class Pending:
    """The adapter is on its way or waits for room: ask again at the next step."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The adapter cannot be had; the sequence ends with this error. Nothing stays registered."""

    error: ManyhatsError


Admission = Ready | Pending | Failed


class Residency(Protocol):
    """Adapters on the device. Never asked about sequences of the base; no call may block or load.

    A sequence that has no lease is asked for again in later steps. One sequence a step speaks for
    all younger ones that wear its adapter: where it finds that pending, they are not asked for.
    Lanes of an ensemble are asked for one by one; they share a ticket, and none keeps a lease that
    it got without the others.
    """

    def prepare(self, seq: Sequence) -> Admission:
        """Get the adapter on its way and take no lease. Ready: ``acquire`` would be too, now."""

    def acquire(self, seq: Sequence) -> Admission:
        """As ``prepare``, and where the answer is Ready the sequence holds a lease from now on."""

    def release(self, seq: Sequence) -> None:
        """End the sequence's lease."""

    def cancel(self, seq: Sequence) -> None:
        """A waiting sequence is gone; it holds no lease and may never have been asked for."""
