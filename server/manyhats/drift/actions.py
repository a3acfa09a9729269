"""Carrying out a decision: through lifecycle's own calls, audited as the actor ``drift``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson

from manyhats.drift.alarms import Alarm
from manyhats.drift.policy import Decision, Latch, Policy, Step, decide
from manyhats.drift.store import DriftStore, scope
from manyhats.errors import ManyhatsError
from manyhats.lifecycle.audit import MAX_REASON, Cause
from manyhats.lifecycle.records import Entry
from manyhats.lifecycle.rollouts import Rollouts
from manyhats.lifecycle.routes import Route
from manyhats.metrics import DriftMetrics
from manyhats.types import TenantId

logger = logging.getLogger(__name__)

ACTOR: Final = "drift"
"""Who the audit log says has made an automatic change."""


class Notify(Protocol):
    """Takes an event for the webhook. False: there was no room for it."""

    def __call__(self, event: Mapping[str, Any]) -> bool:
        """See Notify."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done about an alarm: ``action`` is ``none``, ``dry_run``, ``failed`` or the step."""

    action: str
    why: str
    route: Mapping[str, Any]


class Actor:
    """Acts on alarms by the names' policies. Every call may block on the disk."""

    def __init__(
        self,
        rollouts: Rollouts,
        store: DriftStore,
        metrics: DriftMetrics,
        notify: Notify | None,
        clock: Callable[[], float],
    ) -> None:
        self._rollouts = rollouts
        self._store = store
        self._metrics = metrics
        self._notify = notify
        self._clock = clock

    def policy(self, entry: Entry) -> Policy:
        """The policy of a name: what was set, or to alert. Raises ServiceError."""
        text = self._store.get(f"policy/{scope(entry)}")
        return Policy() if text is None else Policy.load(orjson.loads(text))

    def set_policy(self, entry: Entry, policy: Policy) -> None:
        """Raises ServiceError."""
        self._store.put(f"policy/{scope(entry)}", orjson.dumps(policy.shown()).decode())

    def policies(self) -> Mapping[tuple[TenantId, str], Policy]:
        """Every policy that was set, by owner and name. Raises ServiceError."""
        found = {}
        for key, text in self._store.items("policy/").items():
            _, owner, name = key.split("/", 2)
            found[TenantId(owner), name] = Policy.load(orjson.loads(text))
        return found

    def latch(self, entry: Entry) -> Latch | None:
        """What the automation did to a name the last time. Raises ServiceError."""
        text = self._store.get(f"latch/{scope(entry)}")
        return None if text is None else Latch(**orjson.loads(text))

    def act(self, entry: Entry, alarm: Alarm, *, tell: bool = True) -> Outcome:
        """Do what the policy says about ``alarm``; ``tell`` False: the alarm was told before, so
        only a change is. Raises ServiceError where the store fails: nothing is changed then.
        """
        latch, now = self.latch(entry), self._clock()
        decision = decide(self.policy(entry), alarm, entry.route, latch, now)
        outcome = self._done(entry, alarm, decision, latch, now)
        if outcome.action != "none":
            self._metrics.action(entry.name, outcome.action)
        if decision.alert and (tell or outcome.action != "none"):
            logger.warning("drift: %s; %s (%s)", alarm.described, outcome.action, outcome.why)
            self._alert(entry.name, alarm, outcome)
        return outcome

    def _done(
        self, entry: Entry, alarm: Alarm, decision: Decision, latch: Latch | None, now: float
    ) -> Outcome:
        if decision.step is None:
            return Outcome("none", decision.why, entry.route.shown())
        if decision.dry_run:
            why = f"would have: {decision.step.value}, {decision.why}"
            return Outcome("dry_run", why, entry.route.shown())
        cause = Cause(ACTOR, alarm.described[:MAX_REASON])
        try:
            route = self._change(entry, decision, cause)
        except ManyhatsError as error:
            logger.error("drift could not %s %s: %s", decision.step, entry.name, error.message)
            return Outcome("failed", error.message, entry.route.shown())
        count = 1 if latch is None else latch.count + 1
        kept = Latch(route.shown(), now, count, decision.step.value, cause.reason)
        self._store.put(f"latch/{scope(entry)}", orjson.dumps(kept.shown()).decode())
        return Outcome(decision.step.value, decision.why, route.shown())

    def _change(self, entry: Entry, decision: Decision, cause: Cause) -> Route:
        name, owner, seen = entry.name, entry.owner, entry.route
        if decision.step is Step.HOLD:
            return self._rollouts.hold(name, owner, cause, seen=seen)
        to = None if decision.step is Step.END_CANARY else decision.to
        return self._rollouts.rollback(name, owner, cause, to, seen=seen)

    def _alert(self, name: str, alarm: Alarm, outcome: Outcome) -> None:
        if self._notify is None:
            return
        self._notify(
            {
                "event": "drift",
                "name": name,
                "alarm": alarm.shown(),
                "action": outcome.action,
                "why": outcome.why,
                "route": outcome.route,
            }
        )
