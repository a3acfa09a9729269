"""Fair shares: the bound of the paper, work conservation, weights, priorities, newcomers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.scheduler.blocks import BlockManager
from manyhats.scheduler.fair import FairShares, Prices, Share
from manyhats.scheduler.residency import Failed, Pending, Ready
from manyhats.scheduler.scheduler import Scheduler
from manyhats.types import SamplingParams, Sequence, TenantId

A, B, C = TenantId("a"), TenantId("b"), TenantId("c")
INPUT, OUTPUT = 1.0, 2.0
MAX_SEQS, LONGEST_PROMPT, LONGEST_OUTPUT = 3, 60, 20


class NoAdapters:
    """Nobody here wears one."""

    def prepare(self, seq: Sequence) -> Ready | Pending | Failed:
        raise AssertionError

    acquire = prepare

    def release(self, seq: Sequence) -> None:
        raise AssertionError

    cancel = release


class World:
    """A scheduler over plenty of blocks (or few), and the service that each tenant got from it."""

    def __init__(
        self, shares: Callable[[TenantId], Share] = lambda _: Share(), *, num_blocks: int = 1000
    ) -> None:
        self.fair = FairShares(shares, Prices(INPUT, OUTPUT))
        self.scheduler = Scheduler(
            BlockManager(num_blocks, 4, prefix_cache=True, base_digest="base"),
            NoAdapters(),
            max_num_seqs=MAX_SEQS,
            max_step_tokens=16,
            max_queue=100_000,
            max_context=LONGEST_PROMPT + LONGEST_OUTPUT,
            fair=self.fair,
        )
        self.ids = itertools.count()
        self.prompts: Counter[TenantId] = Counter()
        self.outputs: Counter[TenantId] = Counter()
        self.waiting: Counter[TenantId] = Counter()
        self.lives: dict[int, Sequence] = {}

    def send(self, tenant: TenantId, prompt: int, output: int) -> None:
        ident = next(self.ids)
        tokens = list(range(ident * 1000, ident * 1000 + prompt))
        params = SamplingParams(max_tokens=output, seed=0)
        seq = Sequence(ident, f"r{ident}", 0, tenant, params, None, 0.0, prompt, tokens)
        self.scheduler.add(seq)
        self.waiting[tenant] += 1

    def step(self) -> int:
        """One step; returns how many tokens it computed."""
        schedule = self.scheduler.schedule(0.0)
        for seq in self.scheduler.first_admissions:
            self.prompts[seq.tenant] += seq.prompt_len
            self.waiting[seq.tenant] -= 1
        for item in schedule.items:
            seq = item.sequence
            self.outputs[seq.tenant] += item.samples
            finished = item.samples and seq.output_len + 1 == seq.params.max_tokens
            self.scheduler.complete(item, -1 if item.samples else None, finished)
        return schedule.num_tokens

    def service(self, tenant: TenantId) -> float:
        return INPUT * self.prompts[tenant] + OUTPUT * self.outputs[tenant]


PAPERS = max(INPUT * LONGEST_PROMPT, OUTPUT * MAX_SEQS * (LONGEST_PROMPT + LONGEST_OUTPUT))
"""The paper's U: the longest prompt, or all tokens of a batch at an output's price."""
BOUND = INPUT * LONGEST_PROMPT + OUTPUT * MAX_SEQS * LONGEST_OUTPUT
"""Tighter: the last prompt that was admitted, and all that the batch may still generate."""
assert BOUND <= PAPERS

KIND = st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_OUTPUT))
PATTERN = st.lists(KIND, min_size=1, max_size=5)


@settings(max_examples=20)
@given(mine=PATTERN, theirs=PATTERN, num_blocks=st.sampled_from([30, 60, 1000]))
def test_two_backlogged_tenants_stay_within_the_papers_bound(
    mine: list[tuple[int, int]], theirs: list[tuple[int, int]], num_blocks: int
) -> None:
    """Over every interval, whatever either sends, and with few blocks (preemptions) as well."""
    world = World(num_blocks=num_blocks)
    sources = {A: itertools.cycle(mine), B: itertools.cycle(theirs)}
    leads = [0.0]
    for _ in range(150):
        for tenant, source in sources.items():
            while world.waiting[tenant] < MAX_SEQS + 1:
                world.send(tenant, *next(source))
        assert world.step() > 0, "work-conserving"
        leads.append(world.service(A) - world.service(B))
        assert abs(world.fair.counter(A) - world.fair.counter(B)) <= BOUND
    assert max(leads) - min(leads) <= 2 * BOUND
    assert min(world.service(A), world.service(B)) > 0


def test_turns_would_break_the_bound_that_counters_keep() -> None:
    """The very case that taking turns gets wrong: one sends long prompts, the other short ones."""
    world = World()
    for _ in range(400):
        for tenant, kind in ((A, (LONGEST_PROMPT, LONGEST_OUTPUT)), (B, (1, 1))):
            while world.waiting[tenant] < MAX_SEQS + 1:
                world.send(tenant, *kind)
        world.step()
    assert world.service(A) + world.service(B) > 3 * BOUND
    assert abs(world.service(A) - world.service(B)) <= 2 * BOUND
    assert world.prompts[B] > world.prompts[A] / LONGEST_PROMPT * 10, "far more short ones are done"


def test_weights_divide_the_service() -> None:
    world = World({A: Share(3.0), B: Share(1.0)}.__getitem__)
    for _ in range(600):
        for tenant in (A, B):
            while world.waiting[tenant] < MAX_SEQS + 1:
                world.send(tenant, 5, 5)
        world.step()
    assert world.service(A) / world.service(B) == pytest.approx(3.0, rel=0.1)


def test_a_tenant_alone_gets_everything() -> None:
    world = World()
    for _ in range(100):
        while world.waiting[A] < MAX_SEQS + 1:
            world.send(A, 3, 7)
        assert world.step() > 0
    lone = world.service(A)
    again = World({A: Share(0.001)}.__getitem__)
    for _ in range(100):
        while again.waiting[A] < MAX_SEQS + 1:
            again.send(A, 3, 7)
        again.step()
    assert again.service(A) == lone, "a small weight takes nothing from who is alone"


@settings(max_examples=15)
@given(before=st.integers(1, 150), kind=KIND, waits=st.booleans())
def test_a_newcomer_neither_starves_nor_jumps(
    before: int, kind: tuple[int, int], waits: bool
) -> None:
    """However long the other was served alone: from now on they are within the bound.

    ``waits``: the newcomer was there once before, and left with a small counter.
    """
    world = World()
    if waits:
        world.send(B, 1, 1)
        world.step()
    for _ in range(before):
        while world.waiting[A] < MAX_SEQS + 1:
            world.send(A, *kind)
        world.step()
    start = {t: world.service(t) for t in (A, B)}
    for _ in range(100):
        for tenant in (A, B):
            while world.waiting[tenant] < MAX_SEQS + 1:
                world.send(tenant, *kind)
        world.step()
        gained = {t: world.service(t) - start[t] for t in (A, B)}
        assert abs(gained[A] - gained[B]) <= 2 * BOUND
    assert min(gained.values()) > 0


def test_who_comes_after_everybody_left_starts_where_the_last_one_was() -> None:
    fair = FairShares()
    fair.enter(A, ())
    fair.charge_prompt(A, 500)
    fair.leave(A)
    fair.charge_output(A, 10)
    fair.enter(B, ())
    assert fair.counter(B) == 520.0
    fair.enter(A, (B,))
    assert fair.counter(A) == 520.0


def test_what_runs_is_charged_while_the_tenant_does_not_wait() -> None:
    fair = FairShares(lambda _: Share(weight=4.0))
    fair.enter(A, ())
    fair.charge_prompt(A, 8)
    fair.leave(A)
    fair.charge_output(A, 3)
    assert fair.counter(A) == (8 + 2 * 3) / 4


def test_a_lower_priority_waits_for_the_higher_and_runs_when_it_is_alone() -> None:
    shares = {A: Share(), B: Share(priority=-1)}
    world = World(shares.__getitem__)
    for _ in range(20):
        world.send(B, 2, 2)
    for _ in range(6):
        world.send(A, 2, 2)
    order = []
    while world.scheduler.has_work:
        world.step()
        order += [seq.tenant for seq in world.scheduler.first_admissions]
    assert order == [A] * 6 + [B] * 20


def test_a_changed_priority_lifts_the_tenant_among_its_new_equals() -> None:
    shares = {A: Share(), B: Share(), C: Share(priority=1)}
    fair = FairShares(shares.__getitem__)
    for tenant, waiting in ((C, ()), (A, (C,)), (B, (C, A))):
        fair.enter(tenant, waiting)
    fair.charge_prompt(C, 1000)
    assert fair.rank(A, (A, B, C)) == (0, 0.0)
    shares[A] = Share(priority=1)
    assert fair.rank(A, (A, B, C)) == (-1, 1000.0), "it would have had class 1 to itself else"


def test_counters_of_tenants_long_gone_are_forgotten() -> None:
    fair = FairShares()
    fair.enter(A, ())
    fair.charge_prompt(A, 10**9)
    for number in range(20_000):
        tenant = TenantId(f"t{number}")
        fair.enter(tenant, (A,))
        fair.leave(tenant)
    assert len(fair._counters) < 10_000
    assert fair.counter(A) == 10**9


def test_a_preempted_sequence_is_charged_once() -> None:
    world = World(num_blocks=25)
    for _ in range(4):
        world.send(A, 20, 16)
    preempted = 0
    while world.scheduler.has_work:
        schedule = world.scheduler.schedule(0.0)
        preempted += len(schedule.preempted)
        for item in schedule.items:
            finished = item.samples and item.sequence.output_len + 1 == 16
            world.scheduler.complete(item, -1 if item.samples else None, finished)
    assert preempted > 0
    assert world.fair.counter(A) == 4 * (20 * INPUT + 16 * OUTPUT)
