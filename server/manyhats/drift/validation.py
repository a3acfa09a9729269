"""Revalidation: when a version was last evaluated, whether that is too long ago, when it is to go.

Whoever evaluates a version (its gates, a person) tells the outcome here; it is kept as a series.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import orjson

from manyhats.drift.policy import Policy
from manyhats.drift.store import DriftStore, scope
from manyhats.lifecycle.records import Entry

logger = logging.getLogger(__name__)

KEPT: Final = 100
"""Outcomes of a name that are remembered."""


class Validations:
    """The series of each name, in the store. Every call may block and raises ServiceError."""

    def __init__(self, store: DriftStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def add(
        self,
        entry: Entry,
        version: int,
        *,
        passed: bool,
        by: str,
        figures: Mapping[str, float | None],
        at: float | None = None,
    ) -> dict[str, Any]:
        """One outcome more, of Unix time ``at`` (None: now); it as it is kept."""
        outcome = {
            "version": version,
            "at": self._clock() if at is None else at,
            "passed": passed,
            "by": by,
            "figures": dict(figures),
        }
        series = [*self.series(entry), outcome][-KEPT:]
        self._store.put(f"validation/{scope(entry)}", orjson.dumps(series).decode())
        return outcome

    def series(self, entry: Entry) -> list[dict[str, Any]]:
        """The outcomes of a name, oldest first."""
        text = self._store.get(f"validation/{scope(entry)}")
        return [] if text is None else list(orjson.loads(text))

    def shown(self, entry: Entry, policy: Policy) -> dict[str, Any]:
        """The state of the stable version: ``stale``, when it is due and retires, the series."""
        series = self.series(entry)
        now = self._clock()
        return {
            "stale": self.is_stale(entry, policy),
            "due_at": self.due_at(entry, policy),
            "retire_at": policy.retire_at or None,
            "warnings": list(warnings(entry, policy, now)),
            "series": series,
        }

    def is_stale(self, entry: Entry, policy: Policy) -> bool:
        """Whether the stable version was not validated for the policy's period."""
        due = self.due_at(entry, policy)
        return due is not None and self._clock() >= due

    def due_at(self, entry: Entry, policy: Policy) -> float | None:
        """When the stable version's validation ends (Unix seconds); None: it never does.

        The last outcome that passed counts, or the registration where there is none.
        """
        stable = entry.find(entry.route.stable)
        if stable is None or not policy.revalidate_s:
            return None
        passed = [
            float(outcome["at"])
            for outcome in self.series(entry)
            if outcome["passed"] and outcome["version"] == stable.ref.version
        ]
        return max(passed, default=float(stable.created)) + policy.revalidate_s


def warnings(entry: Entry, policy: Policy, now: float) -> Iterable[str]:
    """What is to be said of a name that retires soon, or should have."""
    if not policy.retire_at or now < policy.retire_at - policy.warn_s:
        return
    days = (policy.retire_at - now) / 86400
    when = f"in {days:.1f} days" if days >= 0 else f"{-days:.1f} days ago: overdue"
    yield f"{entry.name}@{entry.route.stable} is to be replaced {when}"
