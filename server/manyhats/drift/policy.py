"""What is done about an alarm: pure decisions, nothing here touches the disk or the network.

An automatic change never flaps. After one the name is *latched*: the automation leaves it alone
until a human has moved its route (a promotion, say). And it waits longer each time: after n changes
of a name at least ``cool_down_s * 2^(n - 1)`` seconds lie between one and the next.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from manyhats.drift.alarms import Alarm
from manyhats.errors import RequestError
from manyhats.lifecycle.routes import BASELINE, Route

MAX_DOUBLINGS: Final = 10
"""The wait grows no further after as many changes."""
COOL_DOWN_S: Final = 600.0
"""A policy's usual wait."""
WARN_S: Final = 7 * 86400.0
"""How long before its retirement a version is warned of."""


class Action(enum.StrEnum):
    """What a policy does about an alarm, each with what is above it: all but OBSERVE alert."""

    OBSERVE = "observe"
    ALERT = "alert"
    HOLD = "hold"
    ROLLBACK = "rollback"
    BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Policy:
    """Of one name. ``signals``: the only ones that the route is changed for; empty: all.

    ``dry_run``: say what would be done, change nothing. ``revalidate_s``: how old a validation may
    get before the version counts as stale, 0: never. ``retire_at`` (Unix seconds, 0: never): from
    when on the name's stable version is to be replaced; ``warn_s`` before it warnings begin.
    """

    action: Action = Action.ALERT
    dry_run: bool = False
    signals: tuple[str, ...] = ()
    cool_down_s: float = COOL_DOWN_S
    revalidate_s: float = 0.0
    retire_at: float = 0.0
    warn_s: float = WARN_S

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "signals": list(self.signals)}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Policy:
        """What ``shown`` gave."""
        rest = {k: v for k, v in value.items() if k in cls.__dataclass_fields__}
        rest["action"] = Action(rest.get("action", "alert"))
        rest["signals"] = tuple(rest.get("signals", ()))
        return cls(**rest)


@dataclass(frozen=True, slots=True)
class Latch:
    """What the automation has done to a name. ``route`` is how it left the name, as JSON; ``at`` in
    Unix seconds, ``count`` of its changes so far.
    """

    route: Mapping[str, Any]
    at: float
    count: int
    action: str
    reason: str

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Step(enum.StrEnum):
    """One change of a route."""

    HOLD = "hold"
    END_CANARY = "end_canary"
    PREVIOUS = "rollback"
    BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about an alarm. ``step`` None: leave the route, ``why`` says why. ``to`` is the
    version that PREVIOUS and BASELINE go to.
    """

    alert: bool
    step: Step | None = None
    why: str = ""
    to: int | None = None
    dry_run: bool = False


def decide(policy: Policy, alarm: Alarm, route: Route, latch: Latch | None, now: float) -> Decision:
    """What ``policy`` does about ``alarm`` while the name has ``route``."""
    if policy.action is Action.OBSERVE:
        return Decision(alert=False, why="the policy only observes")
    if policy.action is Action.ALERT:
        return Decision(alert=True, why="the policy only alerts")
    if policy.signals and alarm.finding.signal not in policy.signals:
        return Decision(alert=True, why="the policy does not act on this signal")
    if latch is not None:
        if latch.route == route.shown():
            return Decision(
                alert=True, why=f"latched since the last {latch.action}: a human must promote first"
            )
        wait = policy.cool_down_s * 2 ** min(latch.count - 1, MAX_DOUBLINGS)
        if now < latch.at + wait:
            return Decision(alert=True, why=f"backing off for {latch.at + wait - now:.0f} s more")
    return _step(policy, alarm, route)


def _step(policy: Policy, alarm: Alarm, route: Route) -> Decision:
    dry = policy.dry_run
    canary = route.canary
    if canary is not None and canary.version == alarm.version:
        if policy.action is not Action.HOLD:
            return Decision(True, Step.END_CANARY, "the canary ends", dry_run=dry)
        if canary.schedule is None:
            return Decision(True, why="the canary has no schedule: nothing moves it on")
        if canary.schedule.held:
            return Decision(True, why=f"the canary is held already: {canary.schedule.held}")
        return Decision(True, Step.HOLD, "the canary is held", dry_run=dry)
    if alarm.version != route.stable:
        return Decision(True, why="no request for the name is routed to this version")
    if policy.action is Action.HOLD:
        return Decision(True, why="this is the stable version: the policy holds canaries alone")
    if policy.action is Action.BASELINE:
        return Decision(True, Step.BASELINE, "back to the base", BASELINE, dry)
    if route.previous is None:
        return Decision(True, why="there is nothing before this to roll back to")
    return Decision(True, Step.PREVIOUS, "back to what was stable before", route.previous, dry)


def check(policy: Policy, signals: Mapping[str, Any]) -> Policy:
    """``policy`` itself. Raises RequestError for a signal that is not in ``signals``."""
    for name in policy.signals:
        if name not in signals:
            raise RequestError(
                f"signals: there is no signal {name[:100]!r}; there are {', '.join(signals)}",
                param="signals",
            )
    return policy
