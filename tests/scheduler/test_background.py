"""Background sequences: what they may take, and that live ones do not notice them.

``test_simulation.py`` holds their part in whole lives with adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.errors import AdapterLoadError, ConfigError, QueueFullError, RequestError
from manyhats.scheduler.blocks import BlockManager
from manyhats.scheduler.fair import FairShares
from manyhats.scheduler.residency import Admission, Failed, Pending, Ready
from manyhats.scheduler.scheduler import Scheduler
from manyhats.types import (
    AdapterRef,
    Digest,
    Priority,
    SamplingParams,
    Schedule,
    Sequence,
    TenantId,
)

_ids = itertools.count()


class OneSlot:
    """A device for one adapter: the one that is there can be leased, others wait for its leases."""

    def __init__(self) -> None:
        self.here: str | None = None
        self.leases: set[int] = set()
        self.cancelled: list[int] = []
        self.broken: set[str] = set()

    def prepare(self, seq: Sequence) -> Admission:
        assert seq.adapter is not None
        if seq.adapter.name in self.broken:
            return Failed(AdapterLoadError("broken"))
        if self.here != seq.adapter.name and not self.leases:
            self.here = seq.adapter.name  # loaded by the next time that it is asked for
            return Pending()
        return Ready(0) if self.here == seq.adapter.name else Pending()

    def acquire(self, seq: Sequence) -> Admission:
        answer = self.prepare(seq)
        if isinstance(answer, Ready):
            self.leases.add(seq.id)
        return answer

    def release(self, seq: Sequence) -> None:
        self.leases.remove(seq.id)

    def cancel(self, seq: Sequence) -> None:
        assert seq.id not in self.leases
        self.cancelled.append(seq.id)


def make(
    *,
    blocks: int = 100,
    seqs: int = 4,
    tokens: int = 32,
    share: int = 4,
    room: int = 8,
    prefix_cache: bool = False,
    residency: OneSlot | None = None,
    fair: FairShares | None = None,
) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, 4, prefix_cache=prefix_cache, base_digest="base"),
        residency or OneSlot(),
        max_num_seqs=seqs,
        max_step_tokens=tokens,
        max_queue=100,
        max_context=1000,
        max_background=room,
        background_tokens=share,
        fair=fair,
    )


def make_seq(
    prompt: int,
    max_tokens: int = 4,
    *,
    background: bool = False,
    adapter: str | None = None,
    tenant: str = "t",
) -> Sequence:
    ident = next(_ids)
    return Sequence(
        ident,
        f"r{ident}",
        0,
        TenantId(tenant),
        SamplingParams(max_tokens=max_tokens, seed=0),
        AdapterRef(adapter, 1, Digest(adapter)) if adapter is not None else None,
        0.0,
        prompt,
        list(range(prompt)),
        Priority.BACKGROUND if background else Priority.NORMAL,
    )


def step(scheduler: Scheduler, now: float = 0.0) -> Schedule:
    """Schedule and complete; a sequence ends with its last token."""
    schedule = scheduler.schedule(now)
    for item in schedule.items:
        seq = item.sequence
        last = item.samples and seq.output_len + 1 == seq.params.max_tokens
        scheduler.complete(item, 7 if item.samples else None, last)
    return schedule


def counts(schedule: Schedule, seqs: Iterable[Sequence]) -> list[int]:
    by_id = {i.sequence.id: i.count for i in schedule.items}
    return [by_id.get(s.id, 0) for s in seqs]


def test_alone_it_has_the_whole_step_and_beside_live_ones_its_share() -> None:
    scheduler = make()
    work = make_seq(60, background=True)
    scheduler.add(work)
    assert counts(step(scheduler), [work]) == [32]
    live = make_seq(3, max_tokens=9)
    scheduler.add(live)
    assert counts(step(scheduler), [live, work]) == [3, 4]
    assert counts(step(scheduler), [live, work]) == [1, 4]


def test_a_prompt_that_fills_the_step_leaves_it_nothing() -> None:
    scheduler = make()
    work = make_seq(60, background=True)
    scheduler.add(work)
    step(scheduler)
    live = make_seq(40)
    scheduler.add(live)
    assert counts(step(scheduler), [live, work]) == [32, 0]
    assert counts(step(scheduler), [live, work]) == [8, 4]


def test_its_place_goes_to_a_live_one_and_what_it_generated_stays() -> None:
    scheduler = make(seqs=1)
    work = make_seq(3, max_tokens=6, background=True)
    scheduler.add(work)
    step(scheduler)
    step(scheduler)
    live = make_seq(3, max_tokens=2)
    scheduler.add(live)
    schedule = step(scheduler)
    assert schedule.preempted == (work,)
    assert counts(schedule, [live, work]) == [3, 0]
    assert counts(step(scheduler), [live, work]) == [1, 0]
    assert counts(step(scheduler), [work]) == [5]
    assert work.token_ids == [0, 1, 2, 7, 7, 7]


def test_its_blocks_go_to_a_live_one_and_no_live_one_is_preempted_for_it() -> None:
    scheduler = make(blocks=10)
    first, work = make_seq(12, max_tokens=20), make_seq(20, background=True)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(work)
    step(scheduler)
    live = make_seq(12)
    scheduler.add(live)
    schedule = step(scheduler)
    assert schedule.preempted == (work,)
    assert counts(schedule, [first, live, work]) == [1, 12, 0]


def test_its_adapter_gives_way_in_the_same_step() -> None:
    residency = OneSlot()
    scheduler = make(residency=residency)
    work = make_seq(3, max_tokens=50, background=True, adapter="a")
    scheduler.add(work)
    while not residency.leases:
        step(scheduler)
    live = make_seq(3, max_tokens=2, adapter="b")
    scheduler.add(live)
    assert step(scheduler).preempted == (work,)
    assert residency.here == "b", "the live one's load began in the step that it came in"
    assert counts(step(scheduler), [live, work]) == [3, 0]
    step(scheduler)
    assert scheduler.num_waiting == 0
    while not residency.leases:
        step(scheduler)
    assert scheduler.num_background == (0, 1)


def test_it_stops_waiting_for_its_adapter_when_a_live_one_waits() -> None:
    residency = OneSlot()
    scheduler = make(residency=residency)
    live = make_seq(3, max_tokens=50, adapter="a")
    scheduler.add(live)
    step(scheduler)
    step(scheduler)
    work = make_seq(3, background=True, adapter="b")
    scheduler.add(work)
    step(scheduler)
    assert residency.cancelled == []
    scheduler.add(make_seq(3, adapter="c"))
    step(scheduler)
    assert residency.cancelled == [work.id]


def test_an_adapter_that_fails_ends_it_and_the_next_one_runs() -> None:
    residency = OneSlot()
    residency.broken = {"a"}
    scheduler = make(residency=residency)
    bad, good = make_seq(3, background=True, adapter="a"), make_seq(3, background=True)
    scheduler.add(bad)
    scheduler.add(good)
    assert counts(step(scheduler), [good]) == [3]
    assert [s for s, _ in scheduler.take_failed()] == [bad]


def test_its_queue_has_a_bound_of_its_own() -> None:
    scheduler = make(room=2)
    for _ in range(2):
        scheduler.add(make_seq(3, background=True))
    with pytest.raises(QueueFullError, match="of at most 2"):
        scheduler.add(make_seq(3, background=True))
    scheduler.add(make_seq(3))
    assert scheduler.num_waiting == 1
    with pytest.raises(RequestError, match="n is 3, and at most 2"):
        make(room=2).add_all([make_seq(3, background=True) for _ in range(3)])
    with pytest.raises(ConfigError):
        make(share=0)


def test_nobody_is_charged_for_it() -> None:
    fair = FairShares()
    scheduler = make(fair=fair)
    work = make_seq(9, background=True, tenant="u")
    scheduler.add(work)
    while scheduler.has_work:
        step(scheduler)
    assert (fair.counter(TenantId("u")), work.output_len) == (0.0, 4)


def test_it_neither_fills_nor_uses_the_cache_of_prefixes() -> None:
    scheduler = make(prefix_cache=True)
    scheduler.add(make_seq(17, background=True))
    while scheduler.has_work:
        step(scheduler)
    live, again = make_seq(17), make_seq(17)
    for seq, cached in ((live, 0), (again, 16), (make_seq(17, background=True), 0)):
        scheduler.add(seq)
        while scheduler.has_work:
            step(scheduler)
        assert seq.num_cached == cached


LIVES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("tuv"), st.integers(1, 20), st.integers(1, 9)),
    min_size=1,
    max_size=10,
)
WORKS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=8
)


@settings(max_examples=150, deadline=None)
@given(
    lives=LIVES,
    works=WORKS,
    blocks=st.integers(11, 24),
    seqs=st.integers(1, 4),
    spare=st.integers(0, 12),
    share=st.integers(1, 8),
)
def test_live_sequences_are_computed_as_if_it_were_not_there(
    lives: list[tuple[int, str, int, int]],
    works: list[tuple[int, int, int]],
    blocks: int,
    seqs: int,
    spare: int,
    share: int,
) -> None:
    """Every live sequence computes the same tokens in the same steps with and without it."""

    def run(background: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
        scheduler = make(blocks=blocks, seqs=seqs, tokens=seqs + spare, share=share, room=100)
        due: dict[int, list[Sequence]] = {}
        order, when = {}, 0
        for number, (gap, tenant, prompt, max_tokens) in enumerate(lives):
            when += gap
            seq = make_seq(prompt, max_tokens, tenant=tenant)
            order[seq.id] = number
            due.setdefault(when, []).append(seq)
        when = 0
        for gap, prompt, max_tokens in background:
            when += gap
            seq = make_seq(prompt, max_tokens, background=True)
            due.setdefault(when, []).append(seq)
        done: list[list[tuple[int, int, int]]] = []
        while due or scheduler.has_work:
            now = len(done)
            for seq in due.pop(now, ()):
                scheduler.add(seq)
            items = step(scheduler, now).items
            done.append(
                sorted(
                    (order[i.sequence.id], i.start, i.count)
                    for i in items
                    if not i.sequence.background
                )
            )
            assert now < 2000, "somebody starves"
        while done and not done[-1]:
            done.pop()
        return done

    assert run(works) == run([])
