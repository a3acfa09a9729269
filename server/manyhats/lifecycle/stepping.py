"""How a canary's schedule moves on: pure functions of a route and the time."""

from __future__ import annotations

from dataclasses import replace

from manyhats.lifecycle.audit import MAX_REASON
from manyhats.lifecycle.routes import Canary, Route


def is_due(route: Route, now: float) -> bool:
    """Whether the canary's schedule takes its next step now."""
    schedule = route.canary.schedule if route.canary else None
    if route.canary is None or schedule is None or schedule.held or now < schedule.due:
        return False
    return route.canary.percent >= 100 or schedule.step + 1 < len(schedule.steps)


def held(route: Route, reason: str) -> Route:
    """The route with its schedule held for ``reason``, if there is one."""
    if route.canary is None or route.canary.schedule is None:
        return route
    schedule = replace(route.canary.schedule, held=reason[:MAX_REASON])
    return replace(route, canary=replace(route.canary, schedule=schedule))


def next_step(route: Route, now: float) -> Route:
    """The route with its schedule one step further, if there is one."""
    if route.canary is None or route.canary.schedule is None:
        return route
    plan = route.canary.schedule
    step = plan.step + 1
    plan = replace(plan, step=step, due=now + plan.step_s)
    return replace(route, canary=Canary(route.canary.version, plan.steps[step], plan))
