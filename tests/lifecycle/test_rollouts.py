"""Routes: what a name means, every change of it, its audit entry, and a canary's schedule."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.adapter_service import open_adapters, write_adapter

from manyhats.errors import ConflictError, ModelNotFoundError, RequestError
from manyhats.lifecycle.audit import GENESIS, Cause, broken_link
from manyhats.lifecycle.records import Registration
from manyhats.lifecycle.rollouts import Rollouts
from manyhats.lifecycle.routes import (
    BASELINE,
    Canary,
    Route,
    RouteHint,
    Schedule,
    Side,
    drawn,
    parse,
)
from manyhats.lifecycle.states import State
from manyhats.types import DEFAULT_TENANT, TenantId

T = DEFAULT_TENANT
WHY = Cause("ada", "because")
CANARY = RouteHint(side=Side.CANARY)


@pytest.fixture
def adapters(tmp_path):
    with open_adapters(tmp_path) as adapters:
        yield adapters


@pytest.fixture
def rollouts(adapters):
    """``a`` with three versions, the third one stable."""
    for seed in range(3):
        register(adapters, "a", seed)
    return adapters.service.rollouts


def register(adapters, name, seed, **told):
    folder = write_adapter(adapters.root / f"{name}-{seed}", seed)
    return adapters.service.register_folder(
        name, str(folder), tenant=T, registration=Registration(**told)
    )


def serves(adapters, model="a", hint=None) -> str:
    ref = adapters.service.resolve(model, T, hint)
    return "baseline" if ref is None else str(ref)


def log(adapters) -> list[dict]:
    return [e.shown() for e in adapters.service.rollouts.audit(name=None, after=0, limit=10_000)]


def test_a_name_means_its_newest_version_until_somebody_moves_its_route(adapters):
    register(adapters, "a", 0)
    assert adapters.service.entry("a", T).route == Route(1)
    register(adapters, "a", 1)
    assert adapters.service.entry("a", T).route == Route(2, previous=1)
    adapters.service.rollouts.rollback("a", T, WHY)
    assert adapters.service.entry("a", T).route == Route(1, previous=2)
    register(adapters, "a", 2)
    assert serves(adapters) == "a@1", "what somebody has moved stays"
    assert serves(adapters, "a@3") == "a@3"
    register(adapters, "a", 3, promote=True)
    assert adapters.service.entry("a", T).route == Route(4, previous=1)
    register(adapters, "a", 4, promote=False)
    assert serves(adapters) == "a@4"
    register(adapters, "b", 4, promote=False)
    assert serves(adapters, "b") == "b@1", "a name's first version is its stable one"
    register(adapters, "b", 4, promote=True)
    assert len(adapters.service.entry("b", T).versions) == 1


def test_registering_the_same_content_again_undoes_no_rollback(adapters):
    register(adapters, "a", 0)
    adapters.service.rollouts.rollback("a", T, WHY, BASELINE)
    before = log(adapters)
    for promote in (None, True):
        register(adapters, "a", 0, promote=promote)
    assert serves(adapters) == "baseline"
    assert log(adapters) == before


@pytest.mark.parametrize(
    ("do", "route"),
    [
        (lambda r: r.promote("a", T, WHY, 1), Route(1, previous=3)),
        (lambda r: r.promote("a", T, WHY, 3), Route(3, previous=2)),
        (
            lambda r: r.canary("a", T, WHY, version=1, percent=5),
            Route(3, previous=2, canary=Canary(1, 5.0)),
        ),
        (lambda r: r.rollback("a", T, WHY), Route(2, previous=3)),
        (lambda r: r.rollback("a", T, WHY, 1), Route(1, previous=3)),
        (lambda r: r.rollback("a", T, WHY, BASELINE), Route(BASELINE, previous=3)),
    ],
)
def test_each_change_gives_its_route_and_survives_a_restart(adapters, rollouts, do, route):
    assert do(rollouts) == route
    assert adapters.service.entry("a", T).route == route
    home = adapters.home
    adapters.registry.close()
    adapters.store.close()
    with open_adapters(home) as again:
        assert again.service.entry("a", T).route == route
        entries = log(again)
        assert broken_link(entries) == (len(entries), None, entries[-1]["hash"])


def test_a_canary_is_promoted_changed_and_ended(adapters, rollouts):
    rollouts.canary("a", T, WHY, version=1, percent=5)
    assert rollouts.canary("a", T, WHY, version=None, percent=50).canary == Canary(1, 50.0)
    assert rollouts.promote("a", T, WHY) == Route(1, previous=3)
    rollouts.canary("a", T, WHY, version=2, percent=5)
    assert rollouts.rollback("a", T, WHY) == Route(1, previous=3), "the last step is undone"
    rollouts.canary("a", T, WHY, version=2, percent=5)
    assert rollouts.canary("a", T, WHY, version=2, percent=0) == Route(1, previous=3)
    rollouts.canary("a", T, WHY, version=2, percent=5)
    assert rollouts.rollback("a", T, WHY, 1) == Route(1, previous=3)


def test_rolling_back_twice_comes_back(adapters, rollouts):
    rollouts.rollback("a", T, WHY, BASELINE)
    assert serves(adapters) == "baseline"
    assert serves(adapters, "a@2") == "a@2", "a version by its number is served as before"
    assert adapters.service.get("a", T).ref.version == 3
    rollouts.rollback("a", T, WHY)
    assert serves(adapters) == "a@3"
    rollouts.rollback("a", T, WHY)
    assert serves(adapters) == "baseline"
    register(adapters, "new", 9)
    with pytest.raises(ConflictError, match="nothing before this"):
        rollouts.rollback("new", T, WHY)


def test_a_caller_gets_its_side_and_keeps_it_as_the_share_grows(adapters, rollouts):
    users = [RouteHint(f"user {i}") for i in range(2000)]
    on_canary: set[str] = set()
    for percent in (5, 25, 50, 100):
        rollouts.canary("a", T, WHY, version=1, percent=percent)
        now = {u.sticky for u in users if serves(adapters, "a", u) == "a@1"}
        assert now == {u.sticky for u in users if serves(adapters, "a", u) == "a@1"}
        assert on_canary <= now
        assert len(now) == pytest.approx(20 * percent, abs=80)  # over four standard deviations
        on_canary = now
    assert len(on_canary) == 2000
    rollouts.canary("a", T, WHY, version=1, percent=5)
    for user in users[:100]:
        assert serves(adapters, "a", replace(user, side=Side.CANARY)) == "a@1"
        assert serves(adapters, "a", replace(user, side=Side.STABLE)) == "a@3"
    assert serves(adapters) == "a@3", "who asks without a request gets the stable one"
    assert serves(adapters, "a@2", CANARY) == "a@2"
    anonymous = [serves(adapters, "a", RouteHint()) for _ in range(2000)]
    assert anonymous.count("a@1") == pytest.approx(100, abs=60)
    rollouts.canary("a", T, WHY, version=1, percent=0)
    assert serves(adapters, "a", CANARY) == "a@3", "the canary where there is one"


def test_each_canary_draws_anew_and_needs_the_key():
    who = [f"user {i}" for i in range(500)]
    first = [drawn(b"k" * 32, "a", 2, w) for w in who]
    assert all(0 <= d < 100 for d in first)
    for other in (("j", "a", 2), ("k", "b", 2), ("k", "a", 3)):
        again = [drawn(other[0].encode() * 32, other[1], other[2], w) for w in who]
        same = sum((a < 25) == (b < 25) for a, b in zip(first, again, strict=True))
        assert same == pytest.approx(0.625 * 500, abs=60)


@pytest.mark.parametrize(
    ("do", "error", "word"),
    [
        (lambda r: r.promote("a", T, WHY, 7), ModelNotFoundError, "it has 1, 2, 3"),
        (lambda r: r.promote("a", T, WHY), ConflictError, "has no canary: stable 3"),
        (lambda r: r.promote("b", T, WHY, 1), ModelNotFoundError, "no model or adapter 'b'"),
        (lambda r: r.promote("a@1", T, WHY, 1), ModelNotFoundError, "a@1"),
        (lambda r: r.promote("a", TenantId("other"), WHY, 1), ModelNotFoundError, "no model"),
        (lambda r: r.canary("a", T, WHY, version=3, percent=5), ConflictError, "is the stable one"),
        (lambda r: r.canary("a", T, WHY, version=1, percent=101), RequestError, "0 to 100"),
        (lambda r: r.canary("a", T, WHY, version=1, percent=0), ConflictError, "no canary"),
        (lambda r: r.canary("a", T, WHY, version=None, percent=5), ConflictError, "no canary"),
        (lambda r: r.rollback("a", T, WHY, 4), ModelNotFoundError, "no version 4"),
        (lambda r: r.rollback("a", T, Cause("x", "y" * 1001)), RequestError, "at most 1000"),
        (lambda r: r.hold("a", T, WHY), ConflictError, "no canary"),
        (lambda r: r.retire("a", T, WHY, 3), ConflictError, "a@3 is not retired: .* to stable 3"),
        (lambda r: r.retire("a", T, WHY, 4), ModelNotFoundError, "no version 4"),
        (
            lambda r: r.schedule("a", T, WHY, version=1, steps=[5, 5], step_s=1),
            RequestError,
            "each over the one before",
        ),
        (
            lambda r: r.schedule("a", T, WHY, version=1, steps=[], step_s=1),
            RequestError,
            "1 to 32",
        ),
        (
            lambda r: r.schedule("a", T, WHY, version=1, steps=[5], step_s=0),
            RequestError,
            "step_s",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(adapters, rollouts, do, error, word):
    before = adapters.service.entry("a", T), log(adapters)
    with pytest.raises(error, match=word):
        do(rollouts)
    assert (adapters.service.entry("a", T), log(adapters)) == before


def test_a_retired_version_is_out_of_use_until_it_is_brought_back(adapters, rollouts):
    entry = rollouts.retire("a", T, WHY, 2)
    assert [r.state for r in entry.versions] == [State.CHECKED, State.RETIRED, State.CHECKED]
    with pytest.raises(ModelNotFoundError) as caught:
        serves(adapters, "a@2")
    assert caught.value.message.endswith("the newest of it: a@3, a@1")
    assert [str(c.ref) for c in adapters.service.list(T)] == ["a@1", "a@3"]
    for change in (rollouts.promote, rollouts.rollback):
        with pytest.raises(ConflictError, match="a@2 is retired"):
            change("a", T, WHY, 2)
    with pytest.raises(ConflictError, match="a@2 is retired"):
        rollouts.rollback("a", T, WHY)
    rollouts.canary("a", T, WHY, version=1, percent=5)
    with pytest.raises(ConflictError, match="a@1 is not retired"):
        rollouts.retire("a", T, WHY, 1)
    home = adapters.home
    adapters.registry.close()
    adapters.store.close()
    with open_adapters(home) as again:
        assert again.service.entry("a", T).versions[1].state is State.RETIRED
        again.service.rollouts.retire("a", T, WHY, 2, retired=False)
        assert serves(again, "a@2") == "a@2"


def test_what_is_routed_is_deleted_by_force_or_not_at_all(adapters, rollouts):
    digests = [r.ref.digest for r in adapters.service.entry("a", T).versions]
    rollouts.canary("a", T, WHY, version=1, percent=5)
    for model in ("a", "a@1", "a@3"):
        with pytest.raises(ConflictError, match=r"routed to stable 3, canary 1 \(5 %\)"):
            adapters.service.delete(model, T)
    with pytest.raises(ConflictError, match="a@3 is not deleted"):
        adapters.service.delete("a@3", T, force=True)
    [gone] = adapters.service.delete("a@1", T, force=True)
    assert (str(gone), adapters.service.entry("a", T).route) == ("a@1", Route(3, previous=2))
    assert adapters.store.list() == sorted(digests[1:])
    assert adapters.residency.dropped == [gone]
    adapters.service.delete("a@2", T)
    assert adapters.service.entry("a", T).route == Route(3)
    adapters.service.delete("a@3", T)
    assert adapters.store.list() == []
    register(adapters, "a", 0)
    assert serves(adapters) == "a@4"


def test_every_change_is_told_in_the_log(adapters, rollouts):
    rollouts.canary("a", T, WHY, version=1, percent=12.5)
    rollouts.canary("a", T, WHY, version=1, percent=12.5)
    rollouts.rollback("a", T, Cause("bob", "it lies"), BASELINE)
    rollouts.retire("a", T, WHY, 1)
    rollouts.retire("a", T, WHY, 1)
    register(adapters, "b", 0, cause=WHY)
    adapters.service.delete("a", T, force=True, cause=WHY)
    entries = log(adapters)
    assert [(e["action"], e["name"], e["actor"], e["reason"]) for e in entries] == [
        *[("register", "a", "server", "")] * 3,
        ("canary", "a", "ada", "because"),
        ("rollback", "a", "bob", "it lies"),
        ("retire", "a", "ada", "because"),
        ("register", "b", "ada", "because"),
        ("delete", "a", "ada", "because"),
    ]
    assert entries[0]["previous"] == GENESIS
    assert entries[0]["at"] == "1970-01-01T00:20:34.500+00:00"
    assert entries[3]["after"] == {
        "stable": 3, "previous": 2,
        "canary": {"version": 1, "percent": 12.5, "schedule": None},
    }  # fmt: skip
    assert entries[4]["before"] == entries[3]["after"]
    assert entries[4]["after"]["stable"] == "baseline"
    assert [v["version"] for v in entries[7]["before"]["versions"]] == [1, 2, 3]
    assert broken_link(entries) == (8, None, entries[-1]["hash"])
    of_a = rollouts.audit(name="a", after=3, limit=2)
    assert [e.action for e in of_a] == ["canary", "rollback"]


@pytest.mark.parametrize("field", ["actor", "at", "reason", "name", "action", "after", "hash"])
def test_a_changed_missing_or_moved_entry_breaks_the_chain(adapters, rollouts, field):
    good = log(adapters)
    bad = [dict(e) for e in good]
    bad[1][field] = {"stable": 9} if field == "after" else "x"
    assert broken_link(bad)[:2] == (2, "entry 2 is not what its hash says")
    assert broken_link(good[1:])[1] == "entry 1 is missing: 2 is in its place"
    assert "missing" in broken_link([good[0], good[2]])[1]
    renumbered = [good[0], {**good[2], "seq": 2}]
    assert broken_link(renumbered)[1] == "entry 2 does not follow from the one before it"


@pytest.mark.parametrize("sql", ["DELETE FROM audit", "UPDATE audit SET actor = 'x'"])
def test_the_log_is_only_added_to(adapters, rollouts, sql):
    before = log(adapters)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        adapters.registry.store._db.execute(sql)
    assert log(adapters) == before


@pytest.fixture
def clocked(adapters, rollouts):
    now = [1000.0]
    return Rollouts(adapters.registry, adapters.service.entry, clock=lambda: now[0]), now


def test_a_schedule_moves_on_by_time_and_ends_as_the_stable_version(adapters, clocked):
    rollouts, now = clocked
    route = rollouts.schedule("a", T, WHY, version=1, steps=[5, 25, 100], step_s=60)
    assert route.canary == Canary(1, 5.0, Schedule((5.0, 25.0, 100.0), 60.0, 0, 1060.0))
    seen = []
    for _ in range(8):
        rollouts.tick()
        route = adapters.service.entry("a", T).route
        seen.append(route.canary.percent if route.canary else route.stable)
        now[0] += 30
    assert seen == [5.0, 5.0, 25.0, 25.0, 100.0, 100.0, 1, 1]
    assert route == Route(1, previous=3)
    told = [(e["actor"], e["action"]) for e in log(adapters)[3:]]
    assert told == [
        ("ada", "schedule"),
        ("schedule", "advance"),
        ("schedule", "advance"),
        ("schedule", "promote"),
    ]


def test_a_schedule_below_a_hundred_stays_at_its_last_step(adapters, clocked):
    rollouts, now = clocked
    rollouts.schedule("a", T, WHY, version=1, steps=[5, 25], step_s=60)
    for _ in range(4):
        now[0] += 60
        rollouts.tick()
    assert adapters.service.entry("a", T).route.canary.percent == 25


def test_a_check_or_a_hold_stops_a_schedule_until_it_is_resumed(adapters, clocked):
    rollouts, now = clocked
    asked = []

    def check(name, route):
        asked.append((name, route.canary.percent))
        return "perplexity is up by 9 %"

    rollouts.schedule("a", T, WHY, version=1, steps=[5, 100], step_s=60)
    rollouts.tick(check)
    assert asked == [], "a check is asked when a step has ended"
    now[0] += 61
    for _ in range(3):
        rollouts.tick(check)
    assert asked == [("a", 5.0)]
    canary = adapters.service.entry("a", T).route.canary
    assert (canary.percent, canary.schedule.held) == (5.0, "perplexity is up by 9 %")
    assert log(adapters)[-1]["reason"] == "perplexity is up by 9 %"
    now[0] += 600
    rollouts.tick()
    assert adapters.service.entry("a", T).route.canary == canary, "held until it is resumed"
    rollouts.resume("a", T, WHY)
    rollouts.tick()
    assert adapters.service.entry("a", T).route.canary.percent == 5.0, "the step begins anew"
    now[0] += 61
    rollouts.tick(lambda name, route: None)
    assert adapters.service.entry("a", T).route.canary.percent == 100.0
    rollouts.hold("a", T, Cause("bob"))
    now[0] += 61
    rollouts.tick()
    assert adapters.service.entry("a", T).route.canary.schedule.held == "held"
    rollouts.canary("a", T, WHY, version=None, percent=7)
    with pytest.raises(ConflictError, match="has no schedule"):
        rollouts.resume("a", T, WHY)


def test_a_change_made_while_a_check_runs_wins(adapters, clocked):
    rollouts, now = clocked

    def check(name, route):
        rollouts.rollback("a", T, WHY, BASELINE)

    rollouts.schedule("a", T, WHY, version=1, steps=[5, 100], step_s=60)
    now[0] += 61
    rollouts.tick(check)
    assert adapters.service.entry("a", T).route == Route(BASELINE, previous=3)


percent = st.floats(0, 100, exclude_min=True)
versions = st.integers(1, 2**62)
schedules = st.builds(
    Schedule, st.lists(percent, min_size=1).map(tuple), st.floats(1, 9e6), st.integers(0, 9),
    st.floats(0, 4e9), st.text(),
)  # fmt: skip
canaries = st.builds(Canary, versions, percent, st.none() | schedules)


@given(
    st.builds(Route, versions | st.just(BASELINE), st.none() | st.just(BASELINE) | versions,
              st.none() | canaries)
)  # fmt: skip
def test_a_route_is_read_as_it_was_written(route):
    assert parse(route.shown()) == route
