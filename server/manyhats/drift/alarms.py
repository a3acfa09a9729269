"""An alarm: what moved, by how much, since when, with requests to look at."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


class Detector(enum.StrEnum):
    """Which test raised an alarm."""

    WINDOW = "window"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one signal's detectors say now: 1 in ``score`` is the threshold of an alarm.

    ``statistic`` is the KS distance or the G statistic; ``log_p`` a bound of its p-value and
    ``log_e`` the sequential test's e-value, as natural logarithms; ``alpha`` the false-alarm rate
    that the present look may spend. ``psi_threshold`` is what equal distributions exceed once in a
    hundred looks. ``reference`` and ``window`` are means (shares of a flag); None of categories.
    """

    signal: str
    score: float
    test: Detector
    statistic: float
    log_p: float
    log_e: float
    alpha: float
    psi: float
    psi_threshold: float
    reference: float | None
    window: float | None
    window_count: int
    since: float


@dataclass(frozen=True, slots=True)
class Alarm:
    """A finding that has reached the threshold. ``at`` and ``since`` in Unix seconds.

    ``against``: ``reference`` (the version's own) or ``stable`` (a canary's). ``examples``: ids of
    requests in the window, the furthest from the reference first.
    """

    name: str
    version: int
    digest: str
    against: str
    finding: Finding
    at: float
    examples: tuple[str, ...]

    @property
    def described(self) -> str:
        """The alarm in words, for the audit log and people."""
        f = self.finding
        moved = "the mix of categories has changed"
        if f.reference is not None and f.window is not None:
            moved = f"{f.reference:.4g} in the {self.against}, {f.window:.4g} now"
        return (
            f"{f.signal} of {self.name}@{self.version}: {moved} ({f.window_count} requests, "
            f"{f.test.value} test, score {f.score:.2f})"
        )

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "described": self.described}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Alarm:
        """What ``shown`` gave."""
        finding = Finding(**{**value["finding"], "test": Detector(value["finding"]["test"])})
        rest = {key: value[key] for key in ("name", "version", "digest", "against", "at")}
        return cls(**rest, finding=finding, examples=tuple(value["examples"]))
