"""What the slot table answers."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from manyhats.types import Digest


class WaitReason(enum.Enum):
    """Why a request has to ask again: its adapter is being copied, or there is no room yet."""

    LOADING = "loading"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Acquired:
    """The adapter is on the device in ``slot`` and the request holds a lease on it."""

    slot: int


@dataclass(frozen=True, slots=True)
class Present:
    """The adapter is on the device in ``slot``; no lease was taken."""

    slot: int


@dataclass(frozen=True, slots=True)
class StartLoad:
    """The caller must copy the adapter to its place, then call ``loaded`` or ``load_failed``.

    ``starts`` has the first row at each site (0 where the adapter needs none). ``evicted`` lost
    their places for it: their rows may be overwritten at once.
    """

    slot: int
    starts: tuple[int, ...]
    evicted: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again later, with the same ticket."""

    reason: WaitReason


@dataclass(frozen=True, slots=True)
class Resident:
    """One adapter with a place. ``ready`` is false while its weights are being copied."""

    digest: Digest
    slot: int
    leases: int
    pinned: bool
    ready: bool
