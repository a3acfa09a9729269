"""Slots, rank rows, leases, pins and the line: examples, then random lives against a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manyhats.adapters.rows import RowAllocator, SlotStateError, largest_run
from manyhats.adapters.slots import (
    Acquired,
    Present,
    SlotTable,
    StartLoad,
    Wait,
    WaitReason,
)
from manyhats.errors import AdapterLoadError
from manyhats.types import Digest

LOADING = Wait(WaitReason.LOADING)
FULL = Wait(WaitReason.FULL)
A, B, C, D = (Digest(name) for name in "abcd")


def load(table: SlotTable, digest: Digest, ranks: tuple[int, ...], ticket: int) -> StartLoad:
    answer = table.acquire(digest, ranks, ticket)
    assert isinstance(answer, StartLoad), answer
    assert table.loaded(digest)
    return answer


def hold(table: SlotTable, digest: Digest, ranks: tuple[int, ...], ticket: int) -> None:
    if all(r.digest != digest for r in table.residents()):
        load(table, digest, ranks, ticket)
    assert isinstance(table.acquire(digest, ranks, ticket), Acquired)


def digests(table: SlotTable) -> set[Digest]:
    return {r.digest for r in table.residents()}


# -- rows ---------------------------------------------------------------------


def test_best_fit_takes_the_smallest_run_that_holds_it() -> None:
    rows = RowAllocator(20)
    starts = [rows.take(n) for n in (4, 6, 2, 8)]
    assert starts == [0, 4, 10, 12]
    rows.give(4, 6)
    rows.give(0, 4)
    assert rows.runs == ((0, 10),)
    rows.give(12, 8)
    assert rows.take(7) == 12
    assert rows.take(2) == 0


@pytest.mark.parametrize(("start", "count"), [(2, 1), (3, 2), (1, 2), (9, 2), (-1, 1), (5, 0)])
def test_rows_that_were_not_handed_out_are_not_taken_back(start: int, count: int) -> None:
    rows = RowAllocator(10)
    rows.take(10)
    rows.give(2, 2)
    with pytest.raises(SlotStateError):
        rows.give(start, count)
    assert rows.runs == ((2, 2),)


def test_take_without_room_says_so() -> None:
    rows = RowAllocator(4)
    rows.take(3)
    with pytest.raises(SlotStateError, match="no run of 2 rows: 1 of 4"):
        rows.take(2)


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_rows_against_a_bitmap(size: int, steps: list[tuple[bool, int]]) -> None:
    rows, owner, held = RowAllocator(size), [0] * size, []
    for serial, (take, n) in enumerate(steps, 1):
        if take:
            gaps = "".join("x" if o else "." for o in owner).split("x")
            possible = [len(g) for g in gaps if len(g) >= n]
            assert rows.fits(n) == bool(possible)
            if possible:
                start = rows.take(n)
                assert owner[start : start + n] == [0] * n
                low = start
                while low and not owner[low - 1]:
                    low -= 1
                high = start
                while high < size and not owner[high]:
                    high += 1
                assert high - low == min(possible)
                owner[start : start + n] = [serial] * n
                held.append((start, n))
        elif held:
            start, count = held.pop(n % len(held))
            rows.give(start, count)
            owner[start : start + count] = [0] * count
        assert rows.used_rows == sum(bool(c) for c in owner)
        assert sum(count for _, count in rows.runs) == rows.free_rows
        assert all(a + n < b for (a, n), (b, _) in zip(rows.runs, rows.runs[1:], strict=False))


def test_largest_run_joins_only_what_touches() -> None:
    assert largest_run([(5, 2), (0, 3), (3, 2), (9, 6)]) == 7
    assert largest_run([]) == 0


# -- placing and evicting -----------------------------------------------------


def test_first_request_loads_the_next_ones_lease() -> None:
    table = SlotTable(2, (8, 8))
    assert table.acquire(A, (4, 0), 1) == StartLoad(0, (0, 0), ())
    assert table.acquire(A, (4, 0), 2) == LOADING
    table.loaded(A)
    assert table.acquire(A, (4, 0), 2) == Acquired(0)
    assert table.acquire(A, (4, 0), 1) == Acquired(0)
    assert table.row_usage == (4, 0)
    assert table.residents()[0].leases == 2
    assert table.placement(A).starts == (0, 0)


def test_an_adapter_with_no_rows_still_needs_a_slot() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (0,), 1)
    assert table.acquire(B, (0,), 2) == FULL
    table.release(A)
    assert table.acquire(B, (0,), 2) == StartLoad(0, (0,), (A,))


def test_the_least_recently_used_goes_first() -> None:
    table = SlotTable(3, (99,))
    for ticket, digest in enumerate((A, B, C)):
        hold(table, digest, (1,), ticket)
    for digest in (B, A, C):
        table.release(digest)
    answer = table.acquire(D, (1,), 9)
    assert isinstance(answer, StartLoad)
    assert answer.evicted == (B,)


def test_as_few_as_will_do_are_evicted() -> None:
    table = SlotTable(4, (16,))
    for ticket, (digest, rank) in enumerate(((A, 2), (B, 2), (C, 12))):
        hold(table, digest, (rank,), ticket)
        table.release(digest)
    answer = table.acquire(D, (8,), 9)
    assert isinstance(answer, StartLoad)
    assert answer.evicted == (C,)  # A and B are older, and would not have been enough


def test_those_made_superfluous_are_spared() -> None:
    table = SlotTable(5, (16,))
    for ticket, (digest, rank) in enumerate(((A, 4), (B, 4), (C, 4), (D, 4))):
        hold(table, digest, (rank,), ticket)
    for digest in (A, C, D, B):
        table.release(digest)
    answer = table.acquire(Digest("e"), (8,), 9)
    assert isinstance(answer, StartLoad)
    assert set(answer.evicted) == {C, D}


def test_nothing_is_evicted_in_vain() -> None:
    table = SlotTable(3, (10,))
    hold(table, A, (4,), 1)
    hold(table, B, (4,), 2)
    table.release(B)
    assert table.acquire(C, (8,), 3) == FULL
    assert digests(table) == {A, B}


def test_a_site_that_is_tight_decides_though_the_others_have_room() -> None:
    table = SlotTable(4, (100, 4, 100))
    hold(table, A, (1, 3, 1), 1)
    hold(table, B, (50, 0, 1), 2)
    table.release(B)
    assert table.acquire(C, (1, 2, 1), 3) == FULL
    table.release(A)
    answer = table.acquire(C, (1, 2, 1), 3)
    assert isinstance(answer, StartLoad)
    assert answer.evicted == (A,)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    table = SlotTable(2, (8, 4))
    with pytest.raises(AdapterLoadError, match=r"5 rank rows at site 1, and the pool has 4"):
        table.acquire(A, (8, 5), 1)
    assert table.waiting() == ()
    assert isinstance(table.acquire(B, (8, 4), 2), StartLoad)


def test_what_pins_make_impossible_is_refused() -> None:
    table = SlotTable(3, (10,))
    load(table, A, (4,), 1)
    load(table, B, (3,), 2)
    table.pin(B)
    table.cancel_wait(1)
    with pytest.raises(AdapterLoadError, match=r"of 10 has only 4 together that pinned"):
        table.acquire(C, (5,), 3)
    assert isinstance(table.acquire(C, (4,), 3), StartLoad)
    table.unpin(B)
    assert table.acquire(D, (10,), 4) == FULL


def test_an_idle_adapter_with_a_pin_stays() -> None:
    table = SlotTable(2, (8,))
    for ticket, digest in enumerate((A, B)):
        hold(table, digest, (2,), ticket)
        table.release(digest)
    table.pin(A)
    answer = table.acquire(C, (2,), 3)
    assert isinstance(answer, StartLoad)
    assert answer.evicted == (B,)


def test_a_waiter_is_refused_once_pins_shut_it_out() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (2,), 1)
    assert table.acquire(B, (2,), 2) == FULL
    table.pin(A)
    with pytest.raises(AdapterLoadError, match="hold all 1 slots"):
        table.acquire(B, (2,), 2)
    assert table.waiting() == ()


def test_wrong_calls_are_errors() -> None:
    table = SlotTable(1, (4,))
    with pytest.raises(ValueError, match="2 entries for 1 sites"):
        table.acquire(A, (1, 1), 1)
    with pytest.raises(ValueError, match=r"ranks\[0\]"):
        table.acquire(A, (-1,), 1)
    for call in (table.loaded, table.load_failed, table.release, table.pin, table.placement):
        with pytest.raises(SlotStateError, match="no place"):
            call(A)
    load(table, A, (1,), 1)
    with pytest.raises(SlotStateError, match="no lease"):
        table.release(A)
    with pytest.raises(SlotStateError, match="not being loaded"):
        table.loaded(A)
    with pytest.raises(SlotStateError, match="not being loaded"):
        table.load_failed(A)
    with pytest.raises(ValueError, match="num_slots"):
        SlotTable(0, ())


def test_a_failed_load_frees_its_place() -> None:
    table = SlotTable(1, (4,))
    assert isinstance(table.acquire(A, (4,), 1), StartLoad)
    assert table.acquire(B, (4,), 2) == FULL
    table.load_failed(A)
    assert table.row_usage == (0,)
    assert isinstance(table.acquire(B, (4,), 2), StartLoad)


# -- what is brought for a request is kept for it ------------------------------


def test_a_loaded_adapter_waits_for_its_first_lease() -> None:
    table = SlotTable(1, (4,))
    load(table, A, (4,), 5)
    assert table.acquire(B, (4,), 1) == FULL  # older, and still not at A's cost
    assert table.acquire(A, (4,), 5) == Acquired(0)  # not drained before that lease
    table.release(A)
    assert isinstance(table.acquire(B, (4,), 1), StartLoad)


def test_an_abandoned_one_may_go() -> None:
    table = SlotTable(1, (4,))
    load(table, A, (4,), 1)
    assert table.acquire(B, (4,), 2) == FULL
    table.cancel_wait(1)
    assert isinstance(table.acquire(B, (4,), 2), StartLoad)
    table.loaded(B)
    table.cancel_wait(2)
    assert isinstance(table.acquire(C, (4,), 3), StartLoad)


def test_prepare_takes_no_lease_and_keeps_against_younger_requests() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (4,), 1)
    table.release(A)
    assert table.prepare(A, (4,), 4) == Present(0)
    assert table.residents()[0].leases == 0
    assert table.prepare(B, (4,), 5) == FULL
    assert isinstance(table.prepare(C, (4,), 3), StartLoad)


# -- a request that wants several ----------------------------------------------


def test_what_it_has_makes_no_room_for_the_rest_of_what_it_wants() -> None:
    table = SlotTable(2, (8,))
    hold(table, A, (4,), 1)
    table.release(A)
    hold(table, C, (4,), 2)
    assert table.prepare(A, (4,), 5) == Present(0)
    assert table.prepare(B, (4,), 5) == FULL
    assert table.prepare(C, (4,), 6) == FULL, "drained for it, though A has no lease"
    table.release(C)
    assert isinstance(table.prepare(B, (4,), 5), StartLoad)
    table.loaded(B)
    assert (table.acquire(A, (4,), 5), table.acquire(B, (4,), 5)) == (Acquired(0), Acquired(1))


def test_what_a_younger_one_has_found_gives_way_to_an_older_one() -> None:
    table = SlotTable(2, (8,))
    hold(table, A, (4,), 1)
    load(table, B, (4,), 9)
    assert table.prepare(B, (4,), 9) == Present(1)
    assert table.prepare(C, (4,), 9) == FULL
    assert isinstance(table.prepare(D, (4,), 3), StartLoad), "B goes: 9 waits for another still"


def test_what_never_fits_together_is_refused_to_the_one_who_wants_it_alone() -> None:
    table = SlotTable(2, (6,))
    hold(table, A, (4,), 1)
    table.release(A)
    assert table.prepare(A, (4,), 5) == Present(0)
    assert table.acquire(B, (4,), 7) == FULL, "for itself it would fit"
    with pytest.raises(AdapterLoadError, match="beside the other adapters of its ensemble"):
        table.prepare(B, (4,), 5)
    table.cancel_wait(5)
    assert isinstance(table.acquire(B, (4,), 7), StartLoad)


def test_what_was_to_make_room_is_found_to_be_wanted_too() -> None:
    table = SlotTable(1, (8,))
    hold(table, A, (4,), 1)
    assert table.prepare(B, (4,), 5) == FULL
    assert table.prepare(A, (4,), 5) == Present(0)
    with pytest.raises(AdapterLoadError, match="beside the other adapters of its ensemble"):
        table.prepare(B, (4,), 5)


# -- the line -----------------------------------------------------------------


def test_the_older_waiter_is_placed_first_whoever_asks_first() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (4,), 1)
    assert table.acquire(B, (4,), 2) == FULL
    assert table.acquire(C, (4,), 3) == FULL
    table.release(A)
    assert table.acquire(C, (4,), 3) == FULL
    assert table.waiting() == (B, C)
    assert isinstance(table.acquire(B, (4,), 2), StartLoad)


def test_any_request_for_the_waiting_adapter_stands_on_its_place() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (4,), 1)
    assert table.acquire(B, (4,), 2) == FULL
    assert table.acquire(C, (4,), 3) == FULL
    table.release(A)
    assert isinstance(table.acquire(B, (4,), 7), StartLoad)


def test_an_older_request_for_a_waiting_adapter_looks_again() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (4,), 1)
    table.release(A)
    assert table.prepare(A, (4,), 4) == Present(0)
    assert table.acquire(B, (4,), 5) == FULL
    assert table.acquire(B, (4,), 3) == StartLoad(0, (0,), (A,))


def test_a_cancelled_waiter_leaves_the_line() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (4,), 1)
    assert table.acquire(B, (4,), 2) == FULL
    assert table.acquire(C, (4,), 3) == FULL
    assert table.acquire(B, (4,), 4) == FULL
    table.cancel_wait(2)
    assert table.waiting() == (C, B)
    table.cancel_wait(4)
    assert table.waiting() == (C,)
    table.release(A)
    assert isinstance(table.acquire(C, (4,), 3), StartLoad)


def test_a_hot_adapter_is_drained_for_the_waiter() -> None:
    table = SlotTable(2, (4,))
    hold(table, A, (2,), 1)
    hold(table, A, (2,), 2)
    hold(table, B, (2,), 3)
    assert table.acquire(C, (2,), 10) == FULL
    assert table.acquire(A, (2,), 11) == Acquired(0)  # B has fewer leases: it is the victim
    assert table.acquire(B, (2,), 12) == FULL
    assert table.acquire(B, (2,), 9) == Acquired(1)  # older than the waiter
    table.release(B)
    table.release(B)
    assert table.acquire(B, (2,), 12) == FULL
    answer = table.acquire(C, (2,), 10)
    assert isinstance(answer, StartLoad)
    assert answer.evicted == (B,)
    assert table.waiting() == (B,)


def test_the_victim_is_kept_to_though_another_is_freer_by_now() -> None:
    table = SlotTable(2, (4,))
    hold(table, A, (2,), 1)
    hold(table, B, (2,), 2)
    hold(table, B, (2,), 3)
    assert table.acquire(C, (2,), 10) == FULL
    hold(table, A, (2,), 4)
    hold(table, A, (2,), 5)
    table.cancel_wait(7)  # one of those changes after which it looks again
    assert table.acquire(C, (2,), 10) == FULL
    assert table.acquire(A, (2,), 11) == FULL
    assert table.acquire(B, (2,), 12) == Acquired(1)


def test_a_pinned_adapter_is_never_the_victim() -> None:
    table = SlotTable(2, (4,))
    hold(table, A, (2,), 1)
    hold(table, B, (2,), 2)
    hold(table, B, (2,), 3)
    assert table.acquire(C, (2,), 10) == FULL
    table.pin(A)
    assert table.acquire(C, (2,), 10) == FULL
    assert table.acquire(A, (2,), 11) == Acquired(0)
    assert table.acquire(B, (2,), 12) == FULL


def test_draining_ends_with_the_waiter() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (2,), 1)
    assert table.acquire(C, (2,), 10) == FULL
    assert table.acquire(A, (2,), 11) == FULL
    table.cancel_wait(10)
    assert table.acquire(A, (2,), 11) == Acquired(0)
    assert table.waiting() == ()


# -- dropping -----------------------------------------------------------------


def test_drop_frees_at_once_or_with_the_last_lease() -> None:
    table = SlotTable(2, (8,))
    assert table.drop(A)
    hold(table, A, (4,), 1)
    hold(table, B, (4,), 2)
    table.release(B)
    table.pin(B)
    assert table.drop(B)
    assert not table.drop(A)
    with pytest.raises(AdapterLoadError, match="unregistered"):
        table.acquire(A, (4,), 3)
    table.release(A)
    assert table.residents() == ()
    assert table.row_usage == (0,)


def test_drop_during_the_load() -> None:
    table = SlotTable(1, (8,))
    assert isinstance(table.acquire(A, (4,), 1), StartLoad)
    assert not table.drop(A)
    assert not table.loaded(A)
    assert table.residents() == ()


def test_the_same_content_registered_again_is_leased_again() -> None:
    table = SlotTable(1, (8,))
    hold(table, A, (4,), 1)
    assert not table.drop(A)
    table.restore(A)
    assert table.acquire(A, (4,), 2) == Acquired(0)


def test_drop_takes_the_adapter_out_of_the_line() -> None:
    table = SlotTable(1, (4,))
    hold(table, A, (4,), 1)
    assert table.acquire(B, (4,), 2) == FULL
    assert table.acquire(C, (4,), 3) == FULL
    assert table.drop(B)
    table.release(A)
    assert isinstance(table.acquire(C, (4,), 3), StartLoad)


# -- random lives -------------------------------------------------------------

SITES = 3
ROWS = (12, 7, 9)
NAMES = [Digest(f"{i:02d}") for i in range(7)]
RANKS = st.lists(
    st.tuples(*(st.integers(0, rows) for rows in ROWS)), min_size=len(NAMES), max_size=len(NAMES)
)


class Lives(RuleBasedStateMachine):
    """Requests come, ask, lease, end and vanish in any order; the model knows who may go."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(3, ROWS)
        self.ranks: dict[Digest, tuple[int, ...]] = {}
        self.next_ticket = 0
        self.asking: dict[int, Digest] = {}
        self.leased: dict[int, Digest] = {}
        self.loading: set[Digest] = set()
        self.pinned: set[Digest] = set()
        self.dropped: set[Digest] = set()

    @rule(name=st.sampled_from(NAMES), ranks=st.tuples(*(st.integers(0, r * 2 // 3) for r in ROWS)))
    def arrive(self, name: Digest, ranks: tuple[int, ...]) -> None:
        if name in self.dropped:
            return
        self.ranks.setdefault(name, ranks)
        self.asking[self.next_ticket] = name
        self.ask(self.next_ticket)
        self.next_ticket += 1

    def ask(self, ticket: int, prepare: bool = False) -> None:
        name = self.asking[ticket]
        before = {r.digest: r for r in self.table.residents()}
        call = self.table.prepare if prepare else self.table.acquire
        try:
            answer = call(name, self.ranks[name], ticket)
        except AdapterLoadError:
            assert self.pinned or name in self.dropped
            del self.asking[ticket]
            self.table.cancel_wait(ticket)
            return
        if isinstance(answer, Acquired):
            assert not prepare
            assert before[name].slot == answer.slot
            del self.asking[ticket]
            self.leased[ticket] = name
        elif isinstance(answer, StartLoad):
            assert name not in before
            for digest in answer.evicted:
                assert before[digest].ready
                assert digest not in self.leased.values()
                assert digest not in self.pinned
            assert digests(self.table) == (set(before) - set(answer.evicted)) | {name}
            self.loading.add(name)
        else:
            assert digests(self.table) == set(before)
            if answer == LOADING:
                assert name in self.loading

    @precondition(lambda self: self.asking)
    @rule(data=st.data(), prepare=st.booleans())
    def ask_again(self, data: st.DataObject, prepare: bool) -> None:
        self.ask(data.draw(st.sampled_from(sorted(self.asking))), prepare)

    @precondition(lambda self: self.asking)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.asking)))
        del self.asking[ticket]
        self.table.cancel_wait(ticket)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.table.release(self.leased.pop(data.draw(st.sampled_from(sorted(self.leased)))))
        self.forget_dropped()

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), ok=st.booleans())
    def load_ends(self, data: st.DataObject, ok: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(name)
        if ok:
            assert self.table.loaded(name) == (name not in self.dropped)
        else:
            self.table.load_failed(name)
            self.pinned.discard(name)
        self.forget_dropped()

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        present = sorted(digests(self.table) - self.dropped)
        if not present:
            return
        name = data.draw(st.sampled_from(present))
        if name in self.pinned:
            self.table.unpin(name)
            self.pinned.remove(name)
        else:
            self.table.pin(name)
            self.pinned.add(name)

    @rule(name=st.sampled_from(NAMES))
    def drop(self, name: Digest) -> None:
        freed = self.table.drop(name)
        self.pinned.discard(name)
        self.dropped.add(name)
        assert freed == (name not in digests(self.table))
        assert freed == (name not in self.loading and name not in self.leased.values())
        self.forget_dropped()

    def forget_dropped(self) -> None:
        """Once gone it may be registered anew; whoever asked for it was told."""
        for name in tuple(self.dropped - digests(self.table)):
            self.dropped.remove(name)
            for ticket in [t for t, d in self.asking.items() if d == name]:
                del self.asking[ticket]
                self.table.cancel_wait(ticket)

    @invariant()
    def sound(self) -> None:
        self.table.check_invariants()
        for resident in self.table.residents():
            assert resident.leases == list(self.leased.values()).count(resident.digest)
            assert resident.ready == (resident.digest not in self.loading)
            assert resident.pinned == (resident.digest in self.pinned)
        assert set(self.leased.values()) <= digests(self.table)

    def teardown(self) -> None:
        for name in sorted(self.pinned):
            self.table.unpin(name)
        self.pinned.clear()
        for _ in range(4 * (len(self.asking) + len(NAMES)) + 4):
            for name in sorted(self.loading):
                self.loading.remove(name)
                self.table.loaded(name)
            for ticket in sorted(self.leased):
                self.table.release(self.leased.pop(ticket))
            self.forget_dropped()
            for ticket in sorted(self.asking, reverse=True):
                self.ask(ticket)
        assert not self.asking, "everyone is served when leases end"
        for name in sorted(self.loading):
            self.table.loaded(name)
        for ticket in sorted(self.leased):
            self.table.release(self.leased.pop(ticket))
        for name in NAMES:
            assert self.table.drop(name)
        assert self.table.residents() == ()
        assert self.table.row_usage == (0,) * SITES
        assert self.table.waiting() == ()
        self.table.check_invariants()


Lives.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase


@settings(max_examples=60, deadline=None)
@given(
    ranks=RANKS,
    waiters=st.lists(st.integers(3, 6), min_size=1, max_size=4),
    hold_rounds=st.integers(1, 3),
    hot=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_no_waiter_starves_under_a_stream_of_younger_requests(
    ranks: list[tuple[int, ...]],
    waiters: list[int],
    hold_rounds: int,
    hot: int,
    order: object,
) -> None:
    """Each round brings new requests for adapters that are resident, so no adapter is ever idle."""
    table = SlotTable(2, ROWS)
    asking: dict[int, Digest] = {}
    leases: list[tuple[int, Digest]] = []
    serial = 0
    first_waiter = last_waiter = -1
    for now in range(40 * (len(waiters) + 2) * hold_rounds):
        for _, digest in [pair for pair in leases if pair[0] <= now]:
            table.release(digest)
        leases = [pair for pair in leases if pair[0] > now]
        for resident in table.residents():
            if not resident.ready:
                table.loaded(resident.digest)
        names = sorted(digests(table)) or NAMES[:2]
        for name in (names * hot)[: hot + 1]:
            asking[serial] = name
            serial += 1
        if now == 5:
            first_waiter = serial
            for name_index in waiters:
                asking[serial] = NAMES[name_index]
                serial += 1
            last_waiter = serial - 1
        tickets = list(asking)
        order.shuffle(tickets)  # type: ignore[attr-defined]
        for ticket in tickets:
            digest = asking[ticket]
            if isinstance(table.acquire(digest, ranks[NAMES.index(digest)], ticket), Acquired):
                del asking[ticket]
                leases.append((now + hold_rounds, digest))
        table.check_invariants()
        if now > 5 and not any(first_waiter <= t <= last_waiter for t in asking):
            return
    pytest.fail("a waiter was never served")
