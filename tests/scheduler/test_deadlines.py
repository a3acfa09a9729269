"""Which requests have run out of time, and how time and urgency order a tenant's queue."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from manyhats.scheduler.deadlines import Deadlines, out_of_time
from manyhats.scheduler.queue import WaitingQueue
from manyhats.types import SamplingParams, Sequence, TenantId

TIMES = st.integers(0, 20).map(float)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), TIMES),
        st.tuples(st.just("end"), st.integers(0, 60).map(float)),
        st.tuples(st.just("pass"), st.integers(0, 4).map(float)),
    ),
    max_size=150,
)


@given(EVENTS)
def test_each_open_request_expires_once_at_its_time_and_little_is_kept(events) -> None:
    there: dict[str, float] = {}
    deadlines = Deadlines(there.keys)
    now, ids = 0.0, itertools.count()
    for kind, value in events:
        if kind == "add":
            ident = f"r{next(ids)}"
            deadlines.add(ident, now + value)
            there[ident] = now + value
        elif kind == "end" and there:
            del there[sorted(there)[int(value) % len(there)]]
        elif kind == "pass":
            now += value
            late = deadlines.expired(now)
            open_late = [r for r in late if r in there]
            assert set(open_late) == {r for r, at in there.items() if at <= now}
            assert [there[r] for r in open_late] == sorted(there[r] for r in open_late)
            for ident in open_late:
                del there[ident]
        wait = deadlines.wait_s(now)
        assert wait is not None or not there
        assert all(at >= now + (wait or 0.0) for at in there.values())


def test_ended_requests_are_forgotten() -> None:
    there: set[str] = set()
    deadlines = Deadlines(lambda: there)
    for number in range(5000):
        deadlines.add(f"r{number}", 1e9)
    assert len(deadlines) <= 130


_ids = itertools.count()


def sequence(tenant: str, deadline: float | None, urgency: int, adapter=None) -> Sequence:
    params = SamplingParams(max_tokens=8, seed=0)
    seq = Sequence(next(_ids), "r", 0, TenantId(tenant), params, adapter, 5.0, 1, [0])
    seq.deadline, seq.urgency = deadline, urgency
    return seq


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.one_of(st.none(), TIMES),
            st.integers(-2, 2),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_a_tenants_requests_go_by_urgency_then_deadline_then_age(wanted) -> None:
    queue = WaitingQueue()
    pushed = []
    for tenant, deadline, urgency, preempted in wanted:
        seq = sequence(tenant, deadline, urgency)
        pushed.append(seq)
        if preempted:
            seq.preemptions = 1
            queue.push_front(seq)
        else:
            queue.push(seq)
    scan, taken = queue.scan(), []
    while (head := scan.head()) is not None:
        scan.take()
        taken.append(head)
    assert len(taken) == len(pushed)
    for tenant in "ab":
        mine = [s for s in taken if s.tenant == tenant and not s.preemptions]
        assert mine == sorted(
            (s for s in pushed if s.tenant == tenant and not s.preemptions),
            key=lambda s: (-s.urgency, math.inf if s.deadline is None else s.deadline, s.id),
        )
        both = [s for s in taken if s.tenant == tenant]
        assert [bool(s.preemptions) for s in both] == sorted(
            (bool(s.preemptions) for s in both), reverse=True
        ), "who was in mid-sentence goes on first"


def test_urgency_changes_nothing_between_tenants() -> None:
    queue = WaitingQueue()
    calm, urgent = sequence("a", None, 0), [sequence("b", 1.0, 100) for _ in range(3)]
    for seq in (calm, *urgent):
        queue.push(seq)
    scan, order = queue.scan(), []
    while (head := scan.head()) is not None:
        scan.take()
        order.append(head.tenant)
    assert order.index("a") <= 1


def test_the_error_says_how_far_the_request_was() -> None:
    seq = sequence("a", 7.5, 0)
    error = out_of_time([seq], 7.5)
    assert (error.status, error.code, error.param) == (504, "deadline_exceeded", "timeout")
    assert error.message == "the request's time was up after 2.5 s, before its first token"
    seq.token_ids += [1, 2]
    assert out_of_time([seq], 8.0).message.endswith("after 3 s, after 2 tokens")
