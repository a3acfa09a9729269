"""How many users there are at each moment of a run: plain arithmetic, without Locust."""

from __future__ import annotations

import math
from collections.abc import Callable

Profile = Callable[[float], float]
"""Share of the run that has passed (0 to 1) to share of the users (0 to 1)."""


def steady(_passed: float) -> float:
    """All users, all the time."""
    return 1.0


def ramp(passed: float) -> float:
    """From none to all over four fifths of the run: where latency bends is the capacity."""
    return min(1.0, passed / 0.8)


def spike(passed: float) -> float:
    """A tenth of the users; all of them from 40 % to 60 % of the run; a tenth again."""
    return 1.0 if 0.4 <= passed < 0.6 else 0.1


def users_at(profile: Profile, elapsed_s: float, run_s: float, users: int) -> int | None:
    """Users wanted ``elapsed_s`` after the start, at least 1; None once the run is over."""
    if elapsed_s >= run_s:
        return None
    return max(1, math.ceil(users * profile(elapsed_s / run_s)))
