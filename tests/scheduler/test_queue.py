"""The order in which waiting sequences are served."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.scheduler.pace import AdmissionPace
from manyhats.scheduler.queue import WaitingQueue, adapter_digest
from manyhats.types import AdapterRef, Digest, SamplingParams, Sequence, TenantId

_ids = itertools.count()


def make_seq(tenant: str = "t", adapter: str | None = None) -> Sequence:
    ref = AdapterRef(adapter, 1, Digest(adapter)) if adapter is not None else None
    params = SamplingParams(max_tokens=8, seed=0)
    return Sequence(next(_ids), "r", 0, TenantId(tenant), params, ref, 0.0, 1, [0])


def take_all(queue: WaitingQueue, count: int = 99) -> list[Sequence]:
    scan, taken = queue.scan(), []
    while len(taken) < count and (seq := scan.head()) is not None:
        scan.take()
        taken.append(seq)
    return taken


def test_tenants_take_turns_and_each_keeps_its_order() -> None:
    queue = WaitingQueue()
    a = [make_seq("a", adapter) for adapter in ("x", None, "x", "y")]
    b = [make_seq("b") for _ in range(2)]
    for seq in a + b:
        queue.push(seq)
    assert take_all(queue) == [a[0], b[0], a[1], b[1], a[2], a[3]]
    assert len(queue) == 0
    assert list(queue) == []


def test_whose_turn_it_is_outlasts_a_scan() -> None:
    queue = WaitingQueue()
    seqs = [make_seq(tenant) for tenant in "aaabbbccc"]
    for seq in seqs:
        queue.push(seq)
    order = [take_all(queue, 1)[0] for _ in range(9)]
    assert [seq.tenant for seq in order] == list("abcabcabc")
    assert {t: [s for s in order if s.tenant == t] for t in "abc"} == {
        t: [s for s in seqs if s.tenant == t] for t in "abc"
    }


def test_a_preempted_sequence_comes_before_its_tenants_older_ones() -> None:
    queue = WaitingQueue()
    old, preempted, new = make_seq(adapter="x"), make_seq(), make_seq()
    preempted.preemptions = 1
    for seq in (old, new):
        queue.push(seq)
    queue.push_front(preempted)
    assert take_all(queue) == [preempted, old, new]


def test_passing_over_skips_the_adapter_for_every_tenant_and_for_this_scan_alone() -> None:
    queue = WaitingQueue()
    a1, a2, b1, b2 = (make_seq(t, x) for t, x in (("a", "x"), ("a", "y"), ("b", "x"), ("b", None)))
    for seq in (a1, a2, b1, b2):
        queue.push(seq)
    scan = queue.scan()
    assert scan.head() is a1
    scan.pass_over()
    assert scan.head() is a2
    scan.take()
    assert scan.head() is b2
    scan.take()
    assert scan.head() is None
    assert set(take_all(queue)) == {a1, b1}


def test_a_younger_sequence_does_not_speak_for_an_older_one() -> None:
    """An adapter that makes room for somebody is closed to the younger ones alone."""
    queue = WaitingQueue()
    old, young = make_seq("b", "x"), make_seq("a", "x")
    for seq in (young, old):
        queue.push(seq)
    scan = queue.scan()
    assert scan.head() is young
    scan.pass_over()
    assert scan.head() is old
    scan.pass_over()
    assert scan.head() is None


def test_dropping_leaves_the_turn_where_it_is() -> None:
    queue = WaitingQueue()
    a1, a2, b1 = make_seq("a"), make_seq("a"), make_seq("b")
    for seq in (a1, a2, b1):
        queue.push(seq)
    scan = queue.scan()
    assert scan.head() is a1
    scan.drop()
    assert scan.head() is a2
    assert len(queue) == 2


def test_ahead_names_the_next_adapters_once_tenant_by_tenant() -> None:
    queue = WaitingQueue()
    wanted = [("a", "x"), ("a", None), ("a", "y"), ("a", "z"), ("b", "x"), ("b", "w")]
    seqs = [make_seq(t, x) for t, x in wanted]
    for seq in seqs:
        queue.push(seq)
    assert [adapter_digest(s) for s in queue.scan().ahead(3)] == ["x", "w", "y"]
    assert [adapter_digest(s) for s in queue.scan().ahead(9)] == ["x", "w", "y", "z"]
    assert len(queue) == 6


def test_removing_forgets_empty_groups() -> None:
    queue = WaitingQueue()
    seq, other = make_seq("a", "x"), make_seq("b", "x")
    queue.push(seq)
    queue.push(other)
    assert [str(ref) for ref in queue.adapters()] == ["x@1"]
    queue.remove(seq)
    with pytest.raises(ValueError, match="not in deque"):
        queue.remove(seq)
    assert take_all(queue) == [other]
    assert queue.adapters() == ()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", None])), max_size=30))
def test_nobody_is_lost_and_no_tenant_is_two_turns_ahead(who: list[tuple[str, str | None]]) -> None:
    queue = WaitingQueue()
    seqs = [make_seq(t, x) for t, x in who]
    for seq in seqs:
        queue.push(seq)
    left = {t: sum(s.tenant == t for s in seqs) for t in "abc"}
    served = dict.fromkeys("abc", 0)
    taken = take_all(queue)
    for seq in taken:
        served[seq.tenant] += 1
        left[seq.tenant] -= 1
        busy = [served[t] for t in "abc" if left[t] > 0]
        assert all(served[seq.tenant] - n <= 1 for n in busy)
    assert sorted(s.id for s in taken) == [s.id for s in seqs]
    for t in "abc":
        assert [s.id for s in taken if s.tenant == t] == [s.id for s in seqs if s.tenant == t]


def test_pace_follows_the_rate_of_admissions() -> None:
    fast, slow, idle = AdmissionPace(), AdmissionPace(), AdmissionPace()
    assert idle.retry_after_s(100) == 1.0
    for second in range(100):
        fast.note(float(second), 10)
        slow.note(float(second), 1 if second % 4 == 0 else 0)
        idle.note(float(second), 0)
    assert fast.retry_after_s(100) in (1.0, 2.0)
    assert 30 <= slow.retry_after_s(100) <= 50
    assert idle.retry_after_s(100) == 60.0
