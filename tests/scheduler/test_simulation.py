"""Whole lives: random requests, adapters and tenants over tiny pools, the real slot table beneath.

The simulated device remembers what each cache position was written with, so that a block that is
read under another prefix, adapter or tenant, or before it was computed, is seen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.slots import Acquired, Present, SlotTable, StartLoad, Wait
from manyhats.engine.ensembles import wholes
from manyhats.errors import AdapterLoadError, ContextLengthError, RequestError
from manyhats.scheduler.blocks import BlockManager
from manyhats.scheduler.deadlines import Deadlines
from manyhats.scheduler.residency import Admission, Failed, Pending, Ready
from manyhats.scheduler.scheduler import Scheduler
from manyhats.types import (
    BASE_SLOT,
    AdapterRef,
    Digest,
    Priority,
    SamplingParams,
    Schedule,
    Sequence,
    SequenceStatus,
    TenantId,
)

BLOCK = 3
NAMES = ["p", "q", "r", "s"]
RANKS = {"p": (2, 2), "q": (3, 0), "r": (0, 0), "s": (4, 1)}


class Adapters:
    """A residency over a real slot table; loads take ``delay`` steps, ``broken`` ones fail."""

    def __init__(self, slots: int, delay: int, broken: set[str]) -> None:
        self.table = SlotTable(slots, (5, 4))
        self.delay = delay
        self.broken = broken
        self.loading: dict[Digest, int] = {}
        self.errors: set[Digest] = set()
        self.leases: dict[int, Digest] = {}  # by sequence, or by lane

    def tick(self) -> None:
        for digest in tuple(self.loading):
            self.loading[digest] -= 1
            if self.loading[digest] > 0:
                continue
            del self.loading[digest]
            if digest in self.broken:
                self.table.load_failed(digest)
                self.errors.add(digest)
            else:
                assert self.table.loaded(digest)

    def _ask(self, seq: Sequence, lease: bool) -> Admission:
        assert seq.adapter is not None
        assert seq.id not in self.leases
        digest = seq.adapter.digest
        if digest in self.errors:
            self.table.cancel_wait(seq.ticket)
            return Failed(AdapterLoadError("broken"))
        call = self.table.acquire if lease else self.table.prepare
        try:
            answer = call(digest, RANKS[digest], seq.ticket)
        except AdapterLoadError as error:
            self.table.cancel_wait(seq.ticket)
            return Failed(error)
        if isinstance(answer, StartLoad):
            self.loading[digest] = self.delay
        if isinstance(answer, StartLoad | Wait):
            return Pending()
        if isinstance(answer, Acquired):
            self.leases[seq.id] = digest
        else:
            assert isinstance(answer, Present)
        return Ready(answer.slot)

    def prepare(self, seq: Sequence) -> Admission:
        return self._ask(seq, False)

    def acquire(self, seq: Sequence) -> Admission:
        return self._ask(seq, True)

    def release(self, seq: Sequence) -> None:
        self.table.release(self.leases.pop(seq.id))

    def cancel(self, seq: Sequence) -> None:
        assert seq.id not in self.leases
        self.table.cancel_wait(seq.ticket)


@dataclass(frozen=True)
class Arrival:
    """A request of ``n`` choices that comes after ``gap`` steps, leaves after ``patience`` and has
    ``time`` steps to end in.
    """

    gap: int
    tenant: str
    adapter: str | tuple[str | None, ...] | None
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    patience: int | None
    background: bool = False
    time: int | None = None
    urgency: int = 0


@dataclass
class World:
    """The scheduler with its device, and the checks after each step."""

    scheduler: Scheduler
    blocks: BlockManager
    adapters: Adapters
    max_seqs: int
    max_tokens: int
    memory: dict[tuple[int, int], tuple[object, ...]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    background_tokens: int = 2
    finished: dict[int, int] = field(default_factory=dict)  # in which step
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ever_admitted: set[int] = field(default_factory=set)

    def step(self, now: int) -> None:
        self.adapters.tick()
        running = list(self.scheduler._running)
        decoding = [
            lane
            for s in running
            if not s.background and all(e.left == 1 for e in s.computed)
            for lane in s.computed
        ]
        schedule = self.scheduler.schedule(float(now))
        self.check_shape(schedule, decoding)
        self.check_background(schedule, running)
        for seq in schedule.preempted:
            for lane in seq.computed:
                self.computed.pop(lane.id, None)
                if seq.status is SequenceStatus.WAITING:
                    assert (lane.num_computed, lane.block_ids, lane.slot) == (0, [], BASE_SLOT)
        for item in schedule.items:
            self.compute(item.sequence, item.start, item.count)
        for items in wholes(schedule.items).values():
            seq = items[0].sequence.whole or items[0].sequence
            draws = {i.samples for i in items}
            assert len(draws) == 1, "all lanes draw in the same step, or none"
            token = self.next_token(seq) if draws == {True} else None
            if token is not None:
                assert len(items) == len(seq.computed)
                self.tokens[seq.id].append(token)
            done = token is not None and seq.output_len + 1 == seq.params.max_tokens
            self.scheduler.complete_lanes(items, token, done)
            if done:
                self.finished[seq.id] = now
        self.check_books()

    def check_shape(self, schedule: Schedule, decoding: list[Sequence]) -> None:
        items = schedule.items
        assert schedule.num_tokens == sum(i.count for i in items) <= self.max_tokens
        assert len({i.sequence.id for i in items}) == len(items)
        running = list(self.scheduler._running)
        places = sum(len(s.computed) for s in running)
        assert places == self.scheduler._running.places <= self.max_seqs
        single = [i.count == 1 and i.samples for i in items]
        assert single == sorted(single, reverse=True), "decodes are packed first"
        served = {i.sequence for i in items}
        gone = {lane for s in schedule.preempted for lane in s.computed}
        assert set(decoding) <= served | gone, "no decode is starved"
        # For somebody whose adapter then failed, so that nobody else computes anything.
        assert not served & gone or all(lane.background for lane in served)
        for item in items:
            seq = item.sequence
            assert (seq.whole or seq).status is SequenceStatus.RUNNING
            assert item.count >= 1
            assert item.samples == (item.start + item.count == len(seq.token_ids))
            assert (seq.adapter is None) == (seq.slot == BASE_SLOT)
        first = {s.id for s in self.scheduler.first_admissions}
        live = {i.sequence.ticket for i in items if not i.sequence.background}
        begun = live - self.ever_admitted
        idle = {s.id for s in running if s.lanes}  # no lane may end before the others can
        assert begun <= first <= begun | idle
        self.ever_admitted |= first

    def check_background(self, schedule: Schedule, before: list[Sequence]) -> None:
        ours = [i for i in schedule.items if i.sequence.background]
        live = [i for i in schedule.items if not i.sequence.background]
        assert all(e.num_cached == 0 for s in before if s.background for e in s.computed)
        if live or self.scheduler.num_waiting:
            assert sum(i.count for i in ours) <= self.background_tokens
        if self.scheduler.num_waiting:
            whose = {i.sequence.whole or i.sequence for i in ours}
            assert whose <= set(before), "admitted before a live one"
        if any(not s.background for s in schedule.preempted):
            assert not ours
            assert not self.scheduler.num_background[1], "a live one was preempted first"

    def compute(self, seq: Sequence, start: int, count: int) -> None:
        """Read all positions before ``start``, write the next ``count``: each once, in order."""
        expected = self.computed.get(seq.id)
        if expected is None:  # just admitted: whatever the prefix cache holds
            assert start % BLOCK == 0
            assert seq.num_cached == min(start, seq.prompt_len)
        else:
            assert start == expected
        scope = (seq.adapter.digest if seq.adapter else None, seq.tenant)
        for position in range(start + count):
            where = (seq.block_ids[position // BLOCK], position % BLOCK)
            what = (*scope, tuple(seq.token_ids[: position + 1]))
            if position >= start:
                self.memory[where] = what
            else:
                assert self.memory[where] == what
        self.computed[seq.id] = start + count
        if seq.adapter is not None:
            place = self.adapters.table.placement(seq.adapter.digest)
            assert place.slot == seq.slot

    def next_token(self, seq: Sequence) -> int:
        return (sum(seq.token_ids) + len(seq.token_ids) + (seq.slot >= 0)) % 2

    def check_books(self) -> None:
        self.blocks.check_invariants()
        self.adapters.table.check_invariants()
        running = [lane for s in self.scheduler._running for lane in s.computed]
        assert self.blocks.num_used == len({b for s in running for b in s.block_ids})
        assert set(self.adapters.leases) == {s.id for s in running if s.adapter is not None}
        waiting, ran = self.scheduler.num_background
        assert ran == sum(s.background for s in self.scheduler._running)
        assert self.scheduler.num_running + self.scheduler.num_waiting + waiting == sum(
            len(v) for v in self.scheduler._requests.values()
        )


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        gap=st.integers(0, 4),
        tenant=st.sampled_from(["t", "u", "v"]),
        adapter=st.one_of(
            st.sampled_from([None, None, *NAMES]),
            st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=3, unique=True).map(
                tuple
            ),
        ),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple),
        max_tokens=st.integers(1, 9),
        n=st.integers(1, 3),
        patience=st.one_of(st.none(), st.none(), st.integers(0, 12)),
        background=st.sampled_from([False, False, True]),
        time=st.one_of(st.none(), st.none(), st.integers(0, 25)),
        urgency=st.sampled_from([0, 0, 0, 1]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=250, deadline=None)
@given(
    arrivals=ARRIVALS,
    num_blocks=st.integers(8, 20),
    max_seqs=st.integers(1, 5),
    spare_tokens=st.integers(0, 9),
    slots=st.integers(1, 3),
    delay=st.integers(1, 4),
    broken=st.sets(st.sampled_from(NAMES), max_size=1),
    prefix_cache=st.booleans(),
)
def test_every_sequence_ends_and_nothing_leaks(
    arrivals: list[Arrival],
    num_blocks: int,
    max_seqs: int,
    spare_tokens: int,
    slots: int,
    delay: int,
    broken: set[str],
    prefix_cache: bool,
) -> None:
    blocks = BlockManager(num_blocks, BLOCK, prefix_cache=prefix_cache, base_digest="base")
    adapters = Adapters(slots, delay, broken)
    scheduler = Scheduler(
        blocks,
        adapters,
        max_num_seqs=max_seqs,
        max_step_tokens=max_seqs + spare_tokens,
        max_queue=100,
        max_context=24,
        background_tokens=2,
    )
    world = World(scheduler, blocks, adapters, max_seqs, max_seqs + spare_tokens)
    ids = itertools.count()
    pending = list(enumerate(arrivals))
    due = arrivals[0].gap
    leaving: dict[str, int] = {}
    deadlines = Deadlines(lambda: scheduler._requests)
    everyone: list[Sequence] = []
    ended: set[int] = set()
    now = 0
    while pending or scheduler.has_work:
        while pending and due <= now:
            number, arrival = pending.pop(0)
            deadline = None if arrival.time is None else now + arrival.time
            seqs = [
                sequence(next(ids), f"r{number}", i, arrival, deadline) for i in range(arrival.n)
            ]
            world.tokens.update({s.id: [] for s in seqs})
            try:
                scheduler.add_all(seqs)
            except (ContextLengthError, RequestError):  # more lanes or blocks than there are
                assert isinstance(arrival.adapter, tuple)
                due = now + pending[0][1].gap if pending else 0
                continue
            everyone += seqs
            if deadline is not None:
                deadlines.add(f"r{number}", deadline)
            if arrival.patience is not None:
                leaving[f"r{number}"] = now + arrival.patience
            due = now + pending[0][1].gap if pending else 0
        for request_id in [r for r, when in leaving.items() if when <= now]:
            del leaving[request_id]
            ended |= {s.id for s in scheduler.abort(request_id)}
        for request_id in deadlines.expired(now):
            late = scheduler.abort(request_id)
            assert not {s.request_id for s in late} - {request_id}
            ended |= {s.id for s in late}
        world.step(now)
        for seq, _ in scheduler.take_failed():
            worn = {lane.adapter.name for lane in seq.computed if lane.adapter is not None}
            assert worn & broken or len(worn) > slots or too_many_rows(worn)
            ended.add(seq.id)
        now += 1
        assert now < 3000, "somebody starves"
    for seq in everyone:
        assert seq.status is SequenceStatus.FINISHED
        assert (seq.id in world.finished) != (seq.id in ended)
        assert seq.token_ids[: seq.prompt_len] == list(arrivals[int(seq.request_id[1:])].prompt)
        for lane in (seq, *seq.lanes):
            assert lane.token_ids[lane.prompt_len :] == world.tokens[seq.id]
        if seq.id in world.finished:
            assert seq.output_len == seq.params.max_tokens
            assert seq.deadline is None or world.finished[seq.id] < seq.deadline
    assert blocks.num_free == num_blocks
    assert adapters.leases == {}
    assert all(r.leases == 0 for r in adapters.table.residents())
    assert adapters.table.waiting() == ()


def too_many_rows(worn: set[str]) -> bool:
    """Whether they may not fit together: not the sum alone, as rows lie in runs."""
    return any(sum(RANKS[name][site] for name in worn) > 3 for site in (0, 1))


def sequence(
    ident: int, request_id: str, index: int, arrival: Arrival, deadline: float | None = None
) -> Sequence:
    """A sequence; one of an ensemble with a lane a member."""

    def made(number: int, name: str | None, virtual: int = 0) -> Sequence:
        return Sequence(
            number,
            request_id,
            index,
            TenantId(arrival.tenant),
            SamplingParams(max_tokens=arrival.max_tokens, seed=index),
            AdapterRef(name, 1, Digest(name), virtual) if name is not None else None,
            0.0,
            len(arrival.prompt) + virtual,
            [0] * virtual + list(arrival.prompt),
            Priority.BACKGROUND if arrival.background else Priority.NORMAL,
            deadline=deadline,
            urgency=arrival.urgency,
        )

    if not isinstance(arrival.adapter, tuple):
        return made(ident, arrival.adapter)
    whole = made(ident, f"({'+'.join(map(str, arrival.adapter))})")
    whole.lanes = tuple(
        made(100_000 + 10 * ident + i, name, i)
        if name is not None
        else made(100_000 + 10 * ident + i, None)
        for i, name in enumerate(arrival.adapter)
    )
    for lane in whole.lanes:
        lane.whole = whole
    return whole


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 2),
    delay=st.integers(1, 3),
    rare=st.sampled_from(NAMES[1:]),
    max_tokens=st.integers(1, 4),
)
def test_a_rare_adapter_gets_its_turn_against_a_hot_one(
    slots: int, delay: int, rare: str, max_tokens: int
) -> None:
    """Every step brings two requests for the hot adapter and two for the base, for ever."""
    blocks = BlockManager(40, BLOCK, prefix_cache=True, base_digest="base")
    adapters = Adapters(slots, delay, set())
    scheduler = Scheduler(
        blocks, adapters, max_num_seqs=4, max_step_tokens=12, max_queue=10_000, max_context=24
    )
    world = World(scheduler, blocks, adapters, 4, 12)
    ids = itertools.count()

    def arrive(name: str | None, tenant: str) -> Sequence:
        arrival = Arrival(0, tenant, name, (0, 1, 1), max_tokens, 1, None)
        ident = next(ids)
        seq = sequence(ident, f"r{ident}", 0, arrival)
        world.tokens[ident] = []
        scheduler.add(seq)
        return seq

    wanted: Sequence | None = None
    for now in range(400):
        for name in ("p", "p", None, None):
            arrive(name, "t")
        if now == 10:
            wanted = arrive(rare, "u")
        world.step(now)
        if wanted is not None and wanted.status is SequenceStatus.FINISHED:
            return
    raise AssertionError("the rare adapter's request was starved")
