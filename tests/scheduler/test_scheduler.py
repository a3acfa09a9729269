"""Scheduling step by step: examples with a scripted residency."""

from __future__ import annotations

import itertools

import pytest

from manyhats.errors import (
    AdapterLoadError,
    ConfigError,
    ContextLengthError,
    QueueFullError,
    RequestError,
)
from manyhats.scheduler.blocks import BlockManager, SchedulerStateError
from manyhats.scheduler.residency import Admission, Failed, Pending, Ready
from manyhats.scheduler.scheduler import Scheduler
from manyhats.types import (
    BASE_SLOT,
    AdapterRef,
    Digest,
    SamplingParams,
    Schedule,
    Sequence,
    SequenceStatus,
    TenantId,
)

_ids = itertools.count()


class Scripted:
    """Adapters in ``ready`` are in their slot, those in ``broken`` fail, the others are pending."""

    def __init__(self, **ready: int) -> None:
        self.ready = ready
        self.broken: set[str] = set()
        self.leases: list[int] = []
        self.cancelled: list[int] = []
        self.asked: list[tuple[str, str]] = []

    def answer(self, seq: Sequence) -> Admission:
        assert seq.adapter is not None
        if seq.adapter.name in self.broken:
            return Failed(AdapterLoadError(f"{seq.adapter} is broken"))
        slot = self.ready.get(seq.adapter.name)
        return Pending() if slot is None else Ready(slot)

    def prepare(self, seq: Sequence) -> Admission:
        self.asked.append(("prepare", seq.adapter.name if seq.adapter else ""))
        return self.answer(seq)

    def acquire(self, seq: Sequence) -> Admission:
        answer = self.answer(seq)
        if isinstance(answer, Ready):
            self.leases.append(seq.id)
        return answer

    def release(self, seq: Sequence) -> None:
        self.leases.remove(seq.id)

    def cancel(self, seq: Sequence) -> None:
        self.cancelled.append(seq.id)


def make_seq(
    prompt: int,
    max_tokens: int = 8,
    *,
    adapter: str | None = None,
    tenant: str = "t",
    request: str | None = None,
    first_token: int | None = None,
) -> Sequence:
    """A prompt that is like no other, unless ``first_token`` says where it begins."""
    ident = next(_ids)
    ref = AdapterRef(adapter, 1, Digest(adapter)) if adapter is not None else None
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    first = ident * 1000 if first_token is None else first_token
    tokens = list(range(first, first + prompt))
    return Sequence(
        ident, request or f"r{ident}", 0, TenantId(tenant), params, ref, 0.0, prompt, tokens
    )


def make(
    num_blocks: int = 100,
    residency: Scripted | None = None,
    *,
    seqs: int = 8,
    tokens: int = 32,
    queue: int = 100,
    context: int = 1000,
) -> Scheduler:
    blocks = BlockManager(num_blocks, 4, prefix_cache=True, base_digest="base")
    return Scheduler(
        blocks,
        residency or Scripted(),
        max_num_seqs=seqs,
        max_step_tokens=tokens,
        max_queue=queue,
        max_context=context,
    )


def step(scheduler: Scheduler, finish: tuple[Sequence, ...] = ()) -> Schedule:
    """Schedule and complete; each sampled token is -1."""
    schedule = scheduler.schedule(0.0)
    for item in schedule.items:
        scheduler.complete(item, -1 if item.samples else None, item.sequence in finish)
    return schedule


def shape(schedule: Schedule) -> list[tuple[int, int, int, bool]]:
    return [(i.sequence.id, i.start, i.count, i.samples) for i in schedule.items]


def test_a_life() -> None:
    scheduler = make()
    seq = make_seq(5)
    scheduler.add(seq)
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 0)
    assert shape(step(scheduler)) == [(seq.id, 0, 5, True)]
    assert scheduler.first_admissions == (seq,)
    assert (seq.status, seq.num_computed, seq.token_ids[5:]) == (SequenceStatus.RUNNING, 5, [-1])
    assert shape(step(scheduler)) == [(seq.id, 5, 1, True)]
    assert scheduler.first_admissions == ()
    assert shape(step(scheduler, (seq,))) == [(seq.id, 6, 1, True)]
    assert seq.status is SequenceStatus.FINISHED
    assert not scheduler.has_work
    assert scheduler._blocks.num_used == 0
    assert step(scheduler).items == ()


def test_a_long_prompt_is_cut_and_decodes_go_first() -> None:
    scheduler = make(tokens=8)
    short, long, late = make_seq(3), make_seq(17), make_seq(2)
    scheduler.add(short)
    step(scheduler)
    scheduler.add(long)
    scheduler.add(late)
    assert shape(step(scheduler)) == [(short.id, 3, 1, True), (long.id, 0, 7, False)]
    assert long.token_ids[17:] == []
    assert shape(step(scheduler)) == [(short.id, 4, 1, True), (long.id, 7, 7, False)]
    last = step(scheduler)
    assert shape(last) == [
        (short.id, 5, 1, True),
        (long.id, 14, 3, True),
        (late.id, 0, 2, True),
    ]
    assert last.num_tokens <= 8


def test_a_prompt_of_one_token_is_packed_with_the_decodes() -> None:
    scheduler = make()
    long, one = make_seq(4), make_seq(1)
    scheduler.add(long)
    scheduler.add(one)
    assert shape(step(scheduler)) == [(one.id, 0, 1, True), (long.id, 0, 4, True)]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make(seqs=2)
    first, second, third = (make_seq(2) for _ in range(3))
    scheduler.add_all([first, second, third])
    assert len(step(scheduler).items) == 2
    assert len(step(scheduler, (first,)).items) == 2
    assert {i.sequence for i in step(scheduler).items} == {second, third}


def test_the_last_admitted_is_preempted_and_computed_again() -> None:
    residency = Scripted(x=3)
    scheduler = make(num_blocks=5, residency=residency)
    first, second = make_seq(7, 12), make_seq(7, 12, adapter="x")
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    assert (second.slot, residency.leases) == (3, [second.id])
    step(scheduler)
    assert (len(first.block_ids), len(second.block_ids)) == (2, 2)
    schedule = step(scheduler)  # both need a third block and one is left
    assert [i.sequence for i in schedule.items] == [first]
    assert schedule.preempted == (second,)
    assert (second.status, second.preemptions) == (SequenceStatus.WAITING, 1)
    assert (second.num_computed, second.slot, residency.leases) == (0, BASE_SLOT, [])
    generated = second.token_ids[7:]
    assert generated == [-1, -1]
    third = make_seq(1, adapter="x")
    scheduler.add(third)
    while first.status is SequenceStatus.RUNNING:
        step(scheduler, (first,) if first.output_len == 6 else ())
    readmitted = step(scheduler)
    assert readmitted.items[-1].sequence is second  # before the third, which came later
    assert second.num_cached == 4  # its first block was still there, its second was not
    assert shape(readmitted)[-1][1:] == (4, 5, True)
    assert second.token_ids[7:9] == generated
    assert scheduler.first_admissions == (third,)


def test_alone_it_preempts_nobody_and_uses_every_block() -> None:
    scheduler = make(num_blocks=3)
    seq = make_seq(9, 4)
    scheduler.add(seq)
    for _ in range(3):
        step(scheduler)
    step(scheduler, (seq,))
    assert (seq.preemptions, len(seq.token_ids)) == (0, 13)
    assert not scheduler.has_work


def test_alone_it_is_admitted_though_its_prompt_takes_every_block() -> None:
    scheduler = make(num_blocks=3)
    seq = make_seq(12, 1)
    scheduler.add(seq)
    assert shape(step(scheduler, (seq,))) == [(seq.id, 0, 12, True)]


def test_admission_leaves_blocks_for_those_that_run() -> None:
    scheduler = make(num_blocks=4)
    first, second, small = make_seq(8), make_seq(8), make_seq(1)
    for seq in (first, second, small):
        scheduler.add(seq)
    assert [i.sequence for i in step(scheduler).items] == [first]
    # The small one would fit, but the second is next and may not be starved by small ones.
    assert [i.sequence for i in step(scheduler).items] == [first]
    step(scheduler, (first,))
    assert {i.sequence for i in step(scheduler).items} == {second, small}


def test_equal_prompts_share_blocks_once_computed() -> None:
    scheduler = make()
    first = make_seq(9, first_token=0)
    scheduler.add(first)
    step(scheduler)
    second = make_seq(9, first_token=0)
    scheduler.add(second)
    assert shape(step(scheduler))[-1] in {(second.id, 8, 1, True), (first.id, 9, 1, True)}
    assert second.num_cached == 8
    assert second.block_ids[:2] == first.block_ids[:2]


def test_a_pending_adapter_holds_nobody_back() -> None:
    residency = Scripted(y=1)
    scheduler = make(residency=residency)
    waiting = [make_seq(2, adapter="x") for _ in range(50)]
    scheduler.add_all(waiting)
    ready, base = make_seq(2, adapter="y"), make_seq(2)
    scheduler.add(ready)
    scheduler.add(base)
    assert {i.sequence for i in step(scheduler).items} == {ready, base}
    assert [name for _, name in residency.asked].count("x") == 1  # not once for each of the 50
    assert [str(ref) for ref in scheduler.waiting_adapters()] == ["x@1"]
    residency.ready["x"] = 0
    assert {i.sequence for i in step(scheduler).items} == {ready, base, *waiting[:6]}


def test_adapters_are_asked_for_before_there_is_room_to_run() -> None:
    residency = Scripted()
    scheduler = make(residency=residency, seqs=1)
    scheduler.add(make_seq(2))
    for name in "pqrstuvwxyz":
        scheduler.add(make_seq(2, adapter=name))
    step(scheduler)
    assert [name for _, name in residency.asked] == list("pqrstuvw")


def test_a_sequence_that_lacks_blocks_does_not_wait_for_its_adapter_in_vain() -> None:
    """Its adapter is asked for all the same, and once that is there nobody passes it."""
    residency = Scripted()
    scheduler = make(num_blocks=6, residency=residency)
    running, large, small = make_seq(9), make_seq(16, adapter="x"), make_seq(1)
    for seq in (running, large, small):
        scheduler.add(seq)
    assert {i.sequence for i in step(scheduler).items} == {running, small}
    assert ("prepare", "x") in residency.asked
    residency.ready["x"] = 0
    step(scheduler, (small,))
    later = make_seq(1)
    scheduler.add(later)
    assert [i.sequence for i in step(scheduler).items] == [running]
    assert residency.leases == []
    step(scheduler, (running,))
    assert {i.sequence for i in step(scheduler).items} == {large, later}


def test_a_failed_adapter_ends_its_own_sequences_alone() -> None:
    residency = Scripted()
    residency.broken.add("x")
    scheduler = make(residency=residency, seqs=2)
    bad = [make_seq(2, adapter="x") for _ in range(3)]
    good = make_seq(2)
    scheduler.add_all([*bad[:2], good, bad[2]])
    assert [i.sequence for i in step(scheduler).items] == [good]
    failed = scheduler.take_failed()
    assert [seq for seq, _ in failed] == bad
    assert all("x@1 is broken" in error.message for _, error in failed)
    assert all(seq.status is SequenceStatus.FINISHED for seq in bad)
    assert scheduler.take_failed() == []
    assert scheduler.num_waiting == 0


def test_a_failure_is_seen_while_there_is_no_room_to_run() -> None:
    residency = Scripted()
    scheduler = make(residency=residency, seqs=1)
    scheduler.add(make_seq(2))
    step(scheduler)
    residency.broken.add("x")
    bad = make_seq(2, adapter="x")
    scheduler.add(bad)
    step(scheduler)
    assert [seq for seq, _ in scheduler.take_failed()] == [bad]


def test_tenants_are_admitted_in_turn() -> None:
    scheduler = make(seqs=4)
    greedy = [make_seq(2, tenant="a") for _ in range(10)]
    modest = [make_seq(2, tenant="b") for _ in range(2)]
    scheduler.add_all([*greedy, *modest])
    assert [i.sequence for i in step(scheduler).items] == [
        greedy[0],
        modest[0],
        greedy[1],
        modest[1],
    ]


def test_abort_frees_what_waits_and_what_runs() -> None:
    residency = Scripted(x=0)
    scheduler = make(residency=residency, seqs=1)
    choices = [make_seq(5, adapter="x", request="r") for _ in range(2)]
    other = make_seq(5)
    scheduler.add_all([*choices, other])
    step(scheduler)
    assert residency.leases == [choices[0].id]
    assert scheduler.abort("r") == choices
    assert residency.leases == []
    assert residency.cancelled == [choices[1].id]
    assert all(seq.status is SequenceStatus.FINISHED for seq in choices)
    assert scheduler._blocks.num_used == 0
    assert scheduler.abort("r") == []
    assert [i.sequence for i in step(scheduler).items] == [other]


def test_the_queue_is_bounded_and_choices_come_together_or_not_at_all() -> None:
    scheduler = make(queue=3)
    scheduler.add(make_seq(2))
    with pytest.raises(QueueFullError, match="1 sequences are waiting, of at most 3") as caught:
        scheduler.add_all([make_seq(2) for _ in range(3)])
    assert caught.value.retry_after_s == 1.0
    assert scheduler.num_waiting == 1
    with pytest.raises(RequestError, match="n is 4, and at most 3"):
        scheduler.add_all([make_seq(2) for _ in range(4)])
    scheduler.add_all([make_seq(2) for _ in range(2)])
    assert scheduler.num_waiting == 3


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make(num_blocks=4, context=20)
    with pytest.raises(ContextLengthError, match=r"15 tokens and max_tokens is 6: 21 .* of 20"):
        scheduler.add(make_seq(15, 6))
    with pytest.raises(ContextLengthError, match=r"12 tokens and max_tokens is 6: 18 .* 16 tokens"):
        scheduler.add(make_seq(12, 6))
    scheduler.add(make_seq(12, 5))  # the seventeenth token is drawn, never computed
    with pytest.raises(RequestError, match="no token"):
        scheduler.add(make_seq(0))
    with pytest.raises(ContextLengthError):
        scheduler.add_all([make_seq(2), make_seq(30)])
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize(("seqs", "tokens"), [(0, 8), (9, 8)])
def test_a_budget_that_would_starve_decodes_is_refused(seqs: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        make(seqs=seqs, tokens=tokens)


def test_a_prompt_that_is_only_scored_ends_without_a_token() -> None:
    scheduler = make()
    seq = make_seq(6, 0)
    scheduler.add(seq)
    (item,) = scheduler.schedule(0.0).items
    scheduler.complete(item, None, True)
    assert seq.token_ids[6:] == []
    assert not scheduler.has_work


def test_results_that_do_not_belong_to_the_item_are_errors() -> None:
    scheduler = make(tokens=8)
    seq = make_seq(12)
    scheduler.add(seq)
    (item,) = scheduler.schedule(0.0).items
    with pytest.raises(SchedulerStateError, match="samples False"):
        scheduler.complete(item, 1, False)
    scheduler.complete(item, None, False)
    with pytest.raises(SchedulerStateError, match="not at position 0"):
        scheduler.complete(item, None, False)
    (item,) = scheduler.schedule(0.0).items
    with pytest.raises(SchedulerStateError, match="token None"):
        scheduler.complete(item, None, False)
    scheduler.abort(seq.request_id)
    with pytest.raises(SchedulerStateError, match="not at position 8"):
        scheduler.complete(item, 1, False)
