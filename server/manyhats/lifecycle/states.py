"""How far a version has come, and what its name requires before requests may be routed to it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Measure = float | None
"""A value or a bound of a measure; None: undefined, or not judged."""


class State(enum.StrEnum):
    """How far a version has come.

    ``checked``: every check of its registration was passed (before that there is no version).
    ``evaluated``: it has passed an evaluation too, on the general probes alone. ``ready``: one
    that had the adapter's own pairs or rules. ``rejected``: it has failed its last one.
    ``retired``: out of use, and kept.
    """

    CHECKED = "checked"
    EVALUATED = "evaluated"
    READY = "ready"
    REJECTED = "rejected"
    RETIRED = "retired"


class Require(enum.StrEnum):
    """What a version needs before requests may be routed to it.

    ``none``: that it has failed no evaluation. ``evaluated``: that it has passed one. ``ready``:
    that it has passed one on the adapter's own pairs or rules.
    """

    NONE = "none"
    EVALUATED = "evaluated"
    READY = "ready"

    def met_by(self, verdict: Verdict | None) -> bool:
        """Whether a version with this verdict (None: never evaluated) has what is required."""
        if verdict is None:
            return self is Require.NONE
        return verdict.passed and (verdict.own or self is not Require.READY)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a version's last evaluation came to; the whole report is kept beside the registry.

    ``at`` in Unix seconds; ``own``: whether the adapter's own pairs or rules were part of it;
    ``values`` by measure; ``failed``: the measures beyond their bounds, in words.
    """

    at: int
    passed: bool
    own: bool
    values: Mapping[str, Measure] = field(default_factory=dict)
    failed: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        """The version's state after it."""
        if not self.passed:
            return State.REJECTED
        return State.READY if self.own else State.EVALUATED


@dataclass(frozen=True, slots=True)
class Demands:
    """What a name's versions are judged by: the ``thresholds`` that differ from the defaults, and
    what is required of them.
    """

    thresholds: Mapping[str, Measure] = field(default_factory=dict)
    require: Require = Require.NONE

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {"thresholds": dict(self.thresholds), "require": self.require.value}
