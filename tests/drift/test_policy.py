"""Decisions: nothing flaps, nothing is done that the policy does not say, over any history."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.drift import policy as policies
from manyhats.drift.alarms import Alarm, Detector, Finding
from manyhats.drift.policy import Action, Decision, Latch, Policy, Step, decide
from manyhats.drift.signals import SIGNALS
from manyhats.errors import RequestError
from manyhats.lifecycle.routes import Canary, Route, Schedule

PLAN = Schedule((5.0, 50.0), 60.0, 0, 100.0)
STABLE = Route(2, 1)
CANARY = Route(2, 1, Canary(3, 5.0, PLAN))


def alarm(version=2, signal="kl"):
    finding = Finding(
        signal, 1.5, Detector.WINDOW, 0.4, -20, 1.0, 1e-6, 0.3, 0.1, 0.2, 0.5, 64, 10.0
    )
    return Alarm("pirate", version, "ab" * 32, "reference", finding, 20.0, ("r1",))


def latch(route, at=0.0, count=1):
    return Latch(route.shown(), at, count, "rollback", "kl moved")


@pytest.mark.parametrize(
    ("action", "route", "version", "step", "to"),
    [
        (Action.HOLD, CANARY, 3, Step.HOLD, None),
        (Action.ROLLBACK, CANARY, 3, Step.END_CANARY, None),
        (Action.BASELINE, CANARY, 3, Step.END_CANARY, None),
        (Action.HOLD, CANARY, 2, None, None),
        (Action.ROLLBACK, CANARY, 2, Step.PREVIOUS, 1),
        (Action.ROLLBACK, STABLE, 2, Step.PREVIOUS, 1),
        (Action.ROLLBACK, Route(2), 2, None, None),
        (Action.ROLLBACK, Route(2, 0), 2, Step.PREVIOUS, 0),
        (Action.BASELINE, STABLE, 2, Step.BASELINE, 0),
        (Action.BASELINE, STABLE, 1, None, None),
        (Action.HOLD, Route(2, 1, Canary(3, 5.0)), 3, None, None),
        (Action.HOLD, Route(2, 1, Canary(3, 5.0, replace(PLAN, held="me"))), 3, None, None),
        (Action.ALERT, CANARY, 3, None, None),
    ],
)
def test_what_is_done(action, route, version, step, to):
    found = decide(Policy(action), alarm(version), route, None, 50.0)
    assert (found.alert, found.step, found.to) == (True, step, to)
    assert found.why


def test_observing_tells_nobody_and_other_signals_only_alert():
    assert not decide(Policy(Action.OBSERVE), alarm(), STABLE, None, 0).alert
    choosy = Policy(Action.ROLLBACK, signals=("error",))
    assert decide(choosy, alarm(), STABLE, None, 0).step is None
    assert decide(choosy, alarm(signal="error"), STABLE, None, 0).step is Step.PREVIOUS
    with pytest.raises(RequestError, match="no signal 'rhymes'"):
        policies.check(replace(choosy, signals=("rhymes",)), SIGNALS)


@given(
    st.sampled_from([a for a in Action if a not in (Action.OBSERVE, Action.ALERT)]),
    st.sampled_from([STABLE, CANARY]),
    st.sampled_from([2, 3]),
    st.floats(0, 1e9),
)
def test_a_latched_name_is_left_alone_for_ever(action, route, version, now):
    found = decide(Policy(action), alarm(version), route, latch(route), now)
    assert found.step is None
    assert found.alert


@given(st.integers(1, 30), st.floats(0, 1e7))
def test_the_wait_doubles_with_each_change(count, later):
    kept = latch(Route(1, 2), at=100.0, count=count)
    wait = 600.0 * 2 ** min(count - 1, policies.MAX_DOUBLINGS)
    found = decide(Policy(Action.ROLLBACK), alarm(), STABLE, kept, 100.0 + later)
    assert (found.step is None) == (100.0 + later < 100.0 + wait)


def test_a_dry_run_says_what_it_would_do():
    found = decide(Policy(Action.ROLLBACK, dry_run=True), alarm(), STABLE, None, 0)
    assert found == Decision(True, Step.PREVIOUS, "back to what was stable before", 1, True)


@given(
    st.builds(
        Policy,
        action=st.sampled_from(Action),
        dry_run=st.booleans(),
        signals=st.lists(st.sampled_from(sorted(SIGNALS)), max_size=3).map(tuple),
        cool_down_s=st.floats(0, 1e6),
    )
)
def test_policies_and_alarms_survive_json(policy):
    assert Policy.load(policy.shown()) == policy
    assert Alarm.load(alarm().shown()) == alarm()
