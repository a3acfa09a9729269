"""Paged KV blocks: examples, then random lives against a model that knows what each block holds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manyhats.scheduler.blocks import BlockManager, SchedulerStateError
from manyhats.types import AdapterRef, Digest, SamplingParams, Sequence, TenantId

_ids = itertools.count()


def make_seq(
    tokens: list[int],
    *,
    adapter: str | None = None,
    tenant: str = "t",
    prompt_logprobs: int | None = None,
) -> Sequence:
    ref = AdapterRef(adapter, 1, Digest(adapter)) if adapter is not None else None
    params = SamplingParams(max_tokens=8, seed=0, prompt_logprobs=prompt_logprobs)
    return Sequence(
        next(_ids), "r", 0, TenantId(tenant), params, ref, 0.0, len(tokens), list(tokens)
    )


def manager(num_blocks: int = 8, *, prefix_cache: bool = True, base: str = "base") -> BlockManager:
    return BlockManager(num_blocks, 4, prefix_cache=prefix_cache, base_digest=base)


def run(blocks: BlockManager, seq: Sequence) -> int:
    """Match, allocate and compute all of the sequence."""
    cached = blocks.match(seq)
    assert blocks.allocate(seq, len(seq.token_ids))
    blocks.commit(seq, len(seq.token_ids))
    return cached


def test_allocation_is_all_or_nothing() -> None:
    blocks = manager(3)
    seq = make_seq(list(range(20)))
    assert blocks.allocate(seq, 5)
    assert len(seq.block_ids) == 2
    assert blocks.allocate(seq, 8)
    assert len(seq.block_ids) == 2
    assert not blocks.allocate(seq, 13)
    assert len(seq.block_ids) == 2
    assert blocks.num_free == 1
    assert blocks.allocate(seq, 9)
    assert len(set(seq.block_ids)) == 3
    assert (blocks.num_free, blocks.num_used) == (0, 3)
    blocks.free(seq)
    assert (blocks.num_free, seq.block_ids) == (3, [])


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_needed_rounds_up(tokens: int, count: int) -> None:
    assert manager().needed(tokens) == count


@pytest.mark.parametrize(("length", "cached"), [(8, 4), (9, 8), (12, 8), (13, 12), (20, 12)])
def test_whole_blocks_match_and_never_the_last_token(length: int, cached: int) -> None:
    blocks = manager()
    first = make_seq(list(range(13)))
    run(blocks, first)
    second = make_seq(list(range(length)))
    assert blocks.match(second) == cached
    assert second.block_ids == first.block_ids[: cached // 4]
    assert (blocks.hit_tokens, blocks.query_tokens) == (cached, 13 + length)


def test_what_is_not_computed_yet_does_not_match() -> None:
    blocks = manager()
    first = make_seq(list(range(12)))
    blocks.match(first)
    blocks.allocate(first, 12)
    blocks.commit(first, 7)
    assert blocks.match(make_seq(list(range(12)))) == 4


def test_a_freed_prefix_is_found_again_and_its_tail_goes_first() -> None:
    blocks = manager(4)
    run(blocks, make_seq([0] * 4))  # held: three are left
    first = make_seq(list(range(1, 14)))
    blocks.match(first)
    assert blocks.allocate(first, 12)
    blocks.commit(first, 12)
    held = list(first.block_ids)
    blocks.free(first)
    other = make_seq([50, 51, 52, 53])
    run(blocks, other)
    assert other.block_ids == held[2:]
    again = make_seq(list(range(1, 14)))
    assert blocks.match(again) == 8
    assert again.block_ids == held[:2]


def test_blocks_without_content_are_used_before_cached_ones() -> None:
    blocks = manager(3)
    first = make_seq([1, 2, 3, 4, 5])
    run(blocks, first)
    blocks.free(first)
    run(blocks, make_seq([9] * 8))
    assert blocks.match(make_seq([1, 2, 3, 4, 5])) == 4


def test_the_least_recently_freed_goes_first() -> None:
    blocks = manager(2)
    first, second = make_seq([1, 2, 3, 4]), make_seq([5, 6, 7, 8])
    run(blocks, first)
    run(blocks, second)
    blocks.free(second)
    blocks.free(first)
    run(blocks, make_seq([9] * 4))
    assert blocks.match(make_seq([5, 6, 7, 8, 0])) == 0
    assert blocks.match(make_seq([1, 2, 3, 4, 0])) == 4


@pytest.mark.parametrize(
    "other",
    [
        {"adapter": "b"},
        {"adapter": None},
        {"tenant": "u"},
        {"adapter": "at", "tenant": ""},  # "a" + "t", were the fields only joined
    ],
)
def test_never_shared_across_adapters_or_tenants(other: dict[str, str]) -> None:
    blocks = manager()
    run(blocks, make_seq(list(range(9)), adapter="a", tenant="t"))
    assert blocks.match(make_seq(list(range(9)), **{"adapter": "a", "tenant": "t", **other})) == 0
    assert blocks.match(make_seq(list(range(9)), adapter="a", tenant="t")) == 8


def test_the_base_is_part_of_the_key() -> None:
    hashes = set()
    for base in ("base", "other"):
        seq = make_seq([1, 2, 3, 4])
        run(manager(base=base), seq)
        hashes.add(tuple(seq.block_hashes))
    assert len(hashes) == 2


def test_a_block_is_its_whole_prefix() -> None:
    blocks = manager()
    run(blocks, make_seq([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert blocks.match(make_seq([0, 2, 3, 4, 5, 6, 7, 8, 9])) == 0
    assert blocks.match(make_seq([5, 6, 7, 8, 9])) == 0


def test_equal_content_computed_twice_stays_private() -> None:
    blocks = manager()
    first, second = make_seq([1, 2, 3, 4, 5]), make_seq([1, 2, 3, 4, 5])
    for seq in (first, second):
        blocks.match(seq)
        blocks.allocate(seq, 5)
    blocks.commit(first, 5)
    blocks.commit(second, 5)
    third = make_seq([1, 2, 3, 4, 5])
    blocks.match(third)
    assert third.block_ids == first.block_ids[:1]
    for seq in (first, second, third):
        blocks.free(seq)
    blocks.check_invariants()
    assert blocks.num_used == 0


def test_generated_tokens_are_reused_too() -> None:
    blocks = manager()
    first = make_seq([1, 2, 3])
    run(blocks, first)
    first.token_ids += [4, 5, 6, 7, 8, 9]
    assert blocks.allocate(first, 9)
    blocks.commit(first, 9)
    assert blocks.match(make_seq([1, 2, 3, 4, 5, 6, 7, 8, 0])) == 8


def test_prompt_logprobs_want_every_position_computed() -> None:
    blocks = manager()
    run(blocks, make_seq(list(range(9))))
    asking = make_seq(list(range(9)), prompt_logprobs=0)
    assert run(blocks, asking) == 0
    assert asking.block_ids != []


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    blocks = manager(prefix_cache=False)
    first = make_seq(list(range(9)))
    run(blocks, first)
    blocks.free(first)
    assert blocks.match(make_seq(list(range(9)))) == 0
    blocks.check_invariants()


def test_a_cancelled_match_leaves_no_trace() -> None:
    blocks = manager()
    first = make_seq(list(range(9)))
    run(blocks, first)
    counted = (blocks.hit_tokens, blocks.query_tokens, blocks.num_used)
    second = make_seq(list(range(9)))
    blocks.match(second)
    blocks.allocate(second, 9)
    blocks.cancel_match(second)
    assert (blocks.hit_tokens, blocks.query_tokens, blocks.num_used) == counted
    assert second.block_ids == []


def test_wrong_calls_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(0, 4, prefix_cache=True, base_digest="")
    blocks = manager()
    seq = make_seq(list(range(9)))
    run(blocks, seq)
    with pytest.raises(SchedulerStateError, match="holds blocks already"):
        blocks.match(seq)
    with pytest.raises(SchedulerStateError, match="no 10 tokens"):
        blocks.commit(seq, 10)
    with pytest.raises(SchedulerStateError, match="no 4 tokens"):
        blocks.commit(make_seq(list(range(9))), 4)


@dataclass
class Live:
    """A sequence of the model and how far it is computed."""

    seq: Sequence
    computed: int


Content = tuple[str | None, str, tuple[int, ...]]


def frugal(num_blocks: int, idle: int) -> BlockManager:
    return BlockManager(num_blocks, 4, prefix_cache=True, base_digest="base", idle_blocks=idle)


def one_after_the_other(blocks: BlockManager, first: int, count: int) -> list[int]:
    """Prompts of two blocks each, all different; how many of their tokens were cached."""
    found = []
    for number in range(first, first + count):
        seq = make_seq([number] * 8 + [0])
        found.append(run(blocks, seq))
        blocks.free(seq)
    return found


def test_unused_blocks_are_left_alone_while_enough_lie_idle() -> None:
    blocks = frugal(40, 4)
    one_after_the_other(blocks, 0, 30)
    # Three held at a time, and up to four with content beside them.
    assert blocks.num_touched <= 7
    assert one_after_the_other(blocks, 28, 2) == [8, 8]
    blocks.check_invariants()


def test_without_the_bound_every_block_is_used_before_content_gives_way() -> None:
    blocks = manager(40)
    one_after_the_other(blocks, 0, 15)
    assert one_after_the_other(blocks, 0, 15) == [8] * 15
    one_after_the_other(blocks, 15, 30)
    assert blocks.num_touched == 40


def test_prompts_that_come_back_are_soon_all_kept() -> None:
    blocks = frugal(40, 2)
    rounds = [one_after_the_other(blocks, 0, 12) for _ in range(8)]
    assert rounds[0] == [0] * 12
    assert rounds[-1] == [8] * 12
    assert blocks.num_touched < 40
    blocks.check_invariants()


def test_all_blocks_can_be_held_whatever_lies_idle() -> None:
    blocks = frugal(8, 1)
    one_after_the_other(blocks, 0, 3)
    seq = make_seq(list(range(32)))
    assert blocks.allocate(seq, 32)
    assert (blocks.num_free, blocks.num_touched) == (0, 8)
    assert not blocks.allocate(make_seq([1]), 1)
    blocks.free(seq)
    assert blocks.num_free == 8


def test_no_idle_block_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="idle_blocks must be at least 1, not 0"):
        frugal(8, 0)


class Lives(RuleBasedStateMachine):
    """Sequences over two tokens, so that prefixes meet all the time.

    ``content[block]`` is what the device memory would hold: written only when a block is computed.
    ``known`` has the block that was the first to hold a full block's content and still does.
    """

    SIZE = 3
    IDLE: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(
            9, self.SIZE, prefix_cache=True, base_digest="base", idle_blocks=self.IDLE
        )
        self.live: list[Live] = []
        self.content: dict[int, Content] = {}
        self.known: dict[Content, int] = {}

    def prefix(self, seq: Sequence, index: int) -> Content:
        adapter = seq.adapter.digest if seq.adapter else None
        return (adapter, seq.tenant, tuple(seq.token_ids[: (index + 1) * self.SIZE]))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        adapter=st.sampled_from([None, "a", "b"]),
        tenant=st.sampled_from(["t", "u"]),
        logprobs=st.sampled_from([None, None, None, 0]),
    )
    def start(
        self, tokens: list[int], adapter: str | None, tenant: str, logprobs: int | None
    ) -> None:
        seq = make_seq(tokens, adapter=adapter, tenant=tenant, prompt_logprobs=logprobs)
        free, held = self.blocks.num_free, self.held()
        cached = self.blocks.match(seq)
        assert cached == len(seq.block_ids) * self.SIZE
        assert cached < len(tokens)
        assert logprobs is None or cached == 0
        for index, block in enumerate(seq.block_ids):
            assert self.content[block] == self.prefix(seq, index)
        revived = [b for b in seq.block_ids if b not in held]
        assert self.blocks.num_free == free - len(revived)
        # The longest prefix, not just any.
        if logprobs is None and (cached + self.SIZE) < len(tokens):
            assert self.prefix(seq, cached // self.SIZE) not in self.known
        self.live.append(Live(seq, cached))

    def held(self) -> set[int]:
        return {b for one in self.live for b in one.seq.block_ids}

    def pick(self, data: st.DataObject) -> Live:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), step=st.integers(1, 8))
    def compute(self, data: st.DataObject, step: int) -> None:
        one = self.pick(data)
        upto = min(len(one.seq.token_ids), one.computed + step)
        before, free = list(one.seq.block_ids), self.blocks.num_free
        missing = -(-upto // self.SIZE) - len(before)
        fits = missing <= free
        held, touched = self.held(), self.blocks.num_touched
        assert self.blocks.allocate(one.seq, upto) == fits
        if not fits:
            assert one.seq.block_ids == before
            assert self.blocks.num_free == free
            return
        added = one.seq.block_ids[len(before) :]
        assert len(added) == max(0, missing)
        assert self.blocks.num_touched >= touched
        assert all(block < self.blocks.num_touched for block in added)
        assert not set(added) & held
        self.known = {c: b for c, b in self.known.items() if b not in added}
        for position in range(one.computed, upto):
            index = position // self.SIZE
            block = one.seq.block_ids[index]
            assert sum(block in other.seq.block_ids for other in self.live) == 1, "written alone"
            self.content[block] = self.prefix(one.seq, index)
        for index in range(one.computed // self.SIZE, upto // self.SIZE):
            self.known.setdefault(self.prefix(one.seq, index), one.seq.block_ids[index])
        one.computed = upto
        self.blocks.commit(one.seq, upto)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        one = self.pick(data)
        if one.computed == len(one.seq.token_ids):
            one.seq.token_ids.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        one = self.pick(data)
        self.live.remove(one)
        self.blocks.free(one.seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        one = self.pick(data)
        self.blocks.free(one.seq)
        one.computed = self.blocks.match(one.seq)

    @invariant()
    def sound(self) -> None:
        self.blocks.check_invariants()
        assert self.blocks.num_used == len(self.held())
        assert self.blocks.num_used + self.blocks.num_free == 9
        for one in self.live:
            full = one.computed // self.SIZE
            assert len(one.seq.block_ids) == len(set(one.seq.block_ids))
            for index, block in enumerate(one.seq.block_ids[:full]):
                assert self.content[block] == self.prefix(one.seq, index)

    def teardown(self) -> None:
        for one in self.live:
            self.blocks.free(one.seq)
        self.blocks.check_invariants()
        assert self.blocks.num_free == 9


Lives.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase


class FrugalLives(Lives):
    """The same promises where unused blocks are left alone."""

    IDLE = 1


FrugalLives.TestCase.settings = Lives.TestCase.settings
TestFrugalLives = FrugalLives.TestCase
