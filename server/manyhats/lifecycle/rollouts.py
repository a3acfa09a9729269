"""Changing which version a name means: promote, canary, rollback, retire, and a canary's schedule.

Each call is one transaction with its entry in the audit log, and holds for the next request; those
that run keep the version that they were given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from manyhats.errors import ConflictError, RequestError
from manyhats.lifecycle import routes
from manyhats.lifecycle.audit import MAX_REASON, AuditEntry, Cause
from manyhats.lifecycle.records import Entry
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.routes import Canary, Route, Schedule
from manyhats.lifecycle.stepping import held, is_due, next_step
from manyhats.types import TenantId

logger = logging.getLogger(__name__)

MAX_STEPS: Final = 32
"""Bound of a schedule's steps."""

Find = Callable[[str, TenantId], Entry]
"""A name as its tenant sees it. Raises ModelNotFoundError."""

Check = Callable[[str, Route], str | None]
"""Asked before a scheduled canary goes on: why it must not, or None."""


Gate = Callable[[str, TenantId, int], str | None]
"""Why requests should not be routed to a version of a name, or None."""


def _open(_name: str, _tenant: TenantId, _version: int) -> None:
    """The gate where there is none."""


def _forced(cause: Cause, objection: str, *, force: bool) -> Cause:
    """The cause of a promotion against the gate. Raises ConflictError, RequestError."""
    if not force:
        raise ConflictError(
            f"{objection}; promote it all the same with force and a reason", param="version"
        )
    if not cause.reason.strip():
        raise RequestError("reason: a forced promotion needs one", param="reason")
    return replace(cause, reason=f"{cause.reason} [forced: {objection}]"[:MAX_REASON])


class Rollouts:
    """The routes of one server's names. Thread-safe; every call blocks on the disk.

    Every change raises ModelNotFoundError (the name, the version), ConflictError (the version is
    retired, or the route does not allow the change), ServiceError (the disk).
    """

    def __init__(
        self, registry: Registry, find: Find, clock: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._find = find
        self._clock = clock
        self.gate: Gate = _open

    def promote(
        self,
        name: str,
        tenant: TenantId,
        cause: Cause,
        version: int | None = None,
        *,
        force: bool = False,
    ) -> Route:
        """Make ``version`` (None: the canary) the stable one; no canary is left.

        What the gate objects to is a ConflictError, unless ``force`` with a reason, which the audit
        log keeps together with the objection.
        """

        def update(entry: Entry) -> Route:
            wanted = version
            if wanted is None:
                wanted = _canary(entry).version
            return routes.promoted(entry.route, entry.ready(wanted))

        self._registry.refresh()  # the verdict, and the canary, of this moment
        entry = self._find(name, tenant)
        wanted = version if version is not None else _canary(entry).version
        objection = self.gate(name, tenant, entry.ready(wanted))
        if objection is not None:
            cause = _forced(cause, objection, force=force)

        return self._change(name, tenant, "promote", cause, update)

    def canary(
        self,
        name: str,
        tenant: TenantId,
        cause: Cause,
        *,
        version: int | None,
        percent: float,
    ) -> Route:
        """``version`` (None: the canary) gets ``percent`` (0 to 100) of the callers; 0 ends it.

        Raises RequestError as well (the percentage).
        """
        _check_percent(percent, "percent")

        def update(entry: Entry) -> Route:
            wanted = entry.ready(_canary(entry).version if version is None else version)
            if not percent and _canary(entry).version != wanted:
                raise ConflictError(
                    f"version {wanted} is not the canary: {entry.route.described()}",
                    param="version",
                )
            if percent:
                self._pass(name, tenant, wanted)
            return routes.with_canary(entry.route, wanted, float(percent))

        return self._change(name, tenant, "canary", cause, update)

    def shadow(
        self,
        name: str,
        tenant: TenantId,
        cause: Cause,
        *,
        version: int | None,
        percent: float,
    ) -> Route:
        """``version`` (None: the shadow) also runs for ``percent`` (0 to 100) of the requests that
        give the name, and is measured, not answered with; 0 ends it.

        Raises RequestError as well (the percentage).
        """
        _check_percent(percent, "percent")

        def update(entry: Entry) -> Route:
            shadow = entry.route.shadow
            if version is None and shadow is None:
                raise ConflictError(
                    f"adapter {entry.name!r} has no shadow: {entry.route.described()}",
                    param="version",
                )
            wanted = entry.ready(shadow.version if version is None and shadow else version or 0)
            return routes.with_shadow(entry.route, wanted, float(percent))

        return self._change(name, tenant, "shadow", cause, update)

    def schedule(
        self,
        name: str,
        tenant: TenantId,
        cause: Cause,
        *,
        version: int | None,
        steps: Sequence[float],
        step_s: float,
    ) -> Route:
        """``version`` (None: the canary) gets ``steps`` percent of the callers, ``step_s`` seconds
        each; ``tick`` moves it on.

        Raises RequestError as well (the steps).
        """
        for i, percent in enumerate(steps):
            _check_percent(percent, f"steps[{i}]")
        rising = all(a < b for a, b in pairwise(steps))
        if not 1 <= len(steps) <= MAX_STEPS or not rising or not steps[0]:
            raise RequestError(
                f"steps: 1 to {MAX_STEPS} percentages over 0, each over the one before",
                param="steps",
            )
        if not 0 < step_s <= 366 * 86400:
            raise RequestError("step_s: over 0 and at most a year", param="step_s")
        plan = Schedule(tuple(map(float, steps)), float(step_s), 0, self._clock() + step_s)

        def update(entry: Entry) -> Route:
            wanted = entry.ready(_canary(entry).version if version is None else version)
            self._pass(name, tenant, wanted)
            return routes.with_canary(entry.route, wanted, plan.steps[0], plan)

        return self._change(name, tenant, "schedule", cause, update)

    def hold(
        self, name: str, tenant: TenantId, cause: Cause, *, seen: Route | None = None
    ) -> Route:
        """Keep a scheduled canary where it is until ``resume``. ``seen``: see ``rollback``."""

        def update(entry: Entry) -> Route:
            plan = replace(_schedule(entry), held=cause.reason or "held")
            return replace(entry.route, canary=replace(_canary(entry), schedule=plan))

        return self._change(name, tenant, "hold", cause, _unless_moved(update, seen))

    def resume(self, name: str, tenant: TenantId, cause: Cause) -> Route:
        """Let a held canary go on: its present step begins anew."""

        def update(entry: Entry) -> Route:
            plan = _schedule(entry)
            plan = replace(plan, held="", due=self._clock() + plan.step_s)
            return replace(entry.route, canary=replace(_canary(entry), schedule=plan))

        return self._change(name, tenant, "resume", cause, update)

    def rollback(
        self,
        name: str,
        tenant: TenantId,
        cause: Cause,
        to: int | None = None,
        *,
        seen: Route | None = None,
    ) -> Route:
        """End the canary, and go to version ``to`` or BASELINE.

        None undoes the last step: it ends a canary and leaves the stable version; where there is no
        canary, what was stable before is so again. ``seen``: only if the name still has this route
        (ConflictError otherwise).
        """

        def update(entry: Entry) -> Route:
            if to is not None:
                return routes.promoted(entry.route, entry.ready(to, "to"))
            route = routes.undone(entry.route)
            entry.ready(route.stable, "to")
            return route

        return self._change(name, tenant, "rollback", cause, _unless_moved(update, seen))

    def retire(
        self, name: str, tenant: TenantId, cause: Cause, version: int, *, retired: bool = True
    ) -> Entry:
        """Take a version that nothing is routed to out of use, or bring it back.

        Its bytes stay. Returns the name as it is then.
        """
        _check(cause)
        self._find(name, tenant)
        self._registry.retire(name, version, cause, retired=retired)
        return self._find(name, tenant)

    def audit(self, *, name: str | None, after: int, limit: int) -> tuple[AuditEntry, ...]:
        """Entries of the audit log: see ``Registry.audit``."""
        return self._registry.audit(name=name, after=after, limit=limit)

    def tick(self, check: Check | None = None) -> None:
        """Move every scheduled canary on whose step has ended.

        ``check`` may hold it instead, with a reason. After a last step of 100 % the canary is
        promoted; after a lower one it stays as it is. Raises ServiceError.
        """
        now = self._clock()
        for entry in self._registry.scheduled():
            if is_due(entry.route, now):
                self._advance(entry, check(entry.name, entry.route) if check else None, now)

    def objection(self, name: str, route: Route) -> str | None:
        """The gate's answer for a scheduled canary: what ``tick`` takes."""
        entry = self._registry.entry(name)
        if entry is None or route.canary is None:
            return None
        return self.gate(name, entry.owner, route.canary.version)

    def _pass(self, name: str, tenant: TenantId, version: int) -> None:
        objection = self.gate(name, tenant, version)
        if objection is not None:
            raise ConflictError(objection, param="version")

    def _advance(self, seen: Entry, objection: str | None, now: float) -> None:
        if objection:
            self._apply(seen, "hold", objection, lambda entry: held(entry.route, objection))
        elif seen.route.canary is not None and seen.route.canary.percent >= 100:
            version = seen.route.canary.version
            self._apply(
                seen,
                "promote",
                "the last step has ended",
                lambda e: routes.promoted(e.route, version),
            )
        else:
            self._apply(seen, "advance", "the step has ended", lambda e: next_step(e.route, now))

    def _apply(
        self, seen: Entry, action: str, reason: str, update: Callable[[Entry], Route]
    ) -> None:
        """A change by the schedule, unless somebody has changed the route meanwhile."""

        def unless_changed(entry: Entry) -> Route:
            return update(entry) if entry.route == seen.route else entry.route

        cause = Cause("schedule", reason[:MAX_REASON])
        route = self._registry.change(seen.name, action, cause, unless_changed)
        logger.info("schedule: %s %s (%s): %s", action, seen.name, reason, route.described())

    def _change(
        self,
        name: str,
        tenant: TenantId,
        action: str,
        cause: Cause,
        update: Callable[[Entry], Route],
    ) -> Route:
        _check(cause)
        self._find(name, tenant)
        route = self._registry.change(name, action, cause, update)
        logger.info("%s %s by %s: %s", action, name, cause.actor, route.described())
        return route


def _unless_moved(update: Callable[[Entry], Route], seen: Route | None) -> Callable[[Entry], Route]:
    """``update``, refused where the route is not ``seen`` any more."""

    def checked(entry: Entry) -> Route:
        if seen is not None and entry.route != seen:
            raise ConflictError(f"the route of {entry.name!r} has changed meanwhile")
        return update(entry)

    return checked


def _check(cause: Cause) -> None:
    if len(cause.reason) > MAX_REASON:
        raise RequestError(f"reason: at most {MAX_REASON} characters", param="reason")


def _check_percent(percent: float, param: str) -> None:
    if not 0 <= percent <= 100:
        raise RequestError(f"{param} is {percent:g}: 0 to 100", param=param)


def _canary(entry: Entry) -> Canary:
    if entry.route.canary is None:
        raise ConflictError(f"adapter {entry.name!r} has no canary: {entry.route.described()}")
    return entry.route.canary


def _schedule(entry: Entry) -> Schedule:
    schedule = _canary(entry).schedule
    if schedule is None:
        raise ConflictError(f"the canary of {entry.name!r} has no schedule")
    return schedule
