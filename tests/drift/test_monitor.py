"""The monitor over real names, routes and audit log: from finished requests to a rollback."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import SecretStr
from support.adapter_service import open_adapters, write_adapter
from support.api import settings_of

from manyhats.drift.build import open_drift
from manyhats.drift.feedback import Feedback
from manyhats.drift.policy import Action, Policy
from manyhats.drift.report import report
from manyhats.drift.rescoring import Rescorer, Sample, is_sampled
from manyhats.drift.revalidation import Revalidation
from manyhats.drift.signals.finished import Ending, Finished
from manyhats.errors import NotFoundError, QueueFullError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.records import Registration
from manyhats.metrics import Metrics
from manyhats.types import DEFAULT_TENANT, TenantId

HUMAN = Cause("me", "it is fine")
SMALL = {
    "drift_alpha": 0.05,
    "drift_warm_up": 2,
    "drift_reference": 96,
    "drift_window": 64,
    "drift_small_reference": 24,
    "drift_small_window": 16,
}


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@contextmanager
def watching(adapters, home, clock, **changes):
    """(drift, metrics) over ``adapters``, running."""
    metrics = Metrics(10)
    drift = open_drift(
        settings_of(**{**SMALL, **changes}),
        home / "drift.sqlite",
        names=adapters.service,
        rollouts=adapters.service.rollouts,
        metrics=metrics.drift,
        decode=lambda ids: "hello there" if ids[0] else "привет",
        clock=clock,
    )
    drift.monitor.start()
    try:
        yield SimpleNamespace(
            monitor=drift.monitor, validations=drift.validations, metrics=metrics, clock=clock
        )
    finally:
        drift.close()


@pytest.fixture
def adapters(tmp_path):
    """pirate@1 and pirate@2, the second one stable."""
    with open_adapters(tmp_path / "home") as opened:
        for seed in (0, 1, 2):
            told = Registration(promote=seed < 2)
            folder = write_adapter(opened.root / f"p{seed}", seed)
            opened.service.register_folder(
                "pirate", str(folder), tenant=DEFAULT_TENANT, registration=told
            )
        yield opened


@pytest.fixture
def world(adapters, tmp_path):
    with watching(adapters, tmp_path, Clock()) as made:
        made.adapters, made.home = adapters, tmp_path
        yield made


def ref_of(adapters, version):
    return adapters.service.get(f"pirate@{version}", DEFAULT_TENANT).ref


def traffic(world, count, *, version=2, bad=0.0, seed=0, first=0):
    """Requests of one version, a share of them answered with nothing; ids ``r<first>`` and on."""
    rng = np.random.default_rng((seed, version))
    ref = ref_of(world.adapters, version)
    for i in range(count):
        empty = rng.random() < bad
        length = 1 if empty else int(rng.lognormal(4, 0.5)) + 1
        world.monitor.finished(
            Finished(
                request_id=f"r{first + i}",
                tenant=DEFAULT_TENANT,
                adapter=ref,
                prompt_token_ids=tuple(range(1, 2 + int(rng.lognormal(3, 0.4)))),
                token_ids=tuple(int(t) for t in rng.integers(0, 5000, length)),
                text="" if empty else "Ahoy",
                ending=Ending.STOP,
                ttft_s=float(rng.lognormal(-3, 0.3)),
                inter_token_s=float(rng.lognormal(-4, 0.3)),
            )
        )
    world.monitor.settle()


def route(world):
    return world.adapters.service.entry("pirate", DEFAULT_TENANT).route


def set_policy(world, policy):
    entry = world.adapters.service.entry("pirate", DEFAULT_TENANT)
    world.monitor.actor.set_policy(entry, policy)


def audited(world):
    entries = world.adapters.service.rollouts.audit(name="pirate", after=0, limit=1000)
    return [(e.actor, e.action) for e in entries if e.action != "register"]


def value(world, name, **labels):
    return world.metrics.registry.get_sample_value(name, labels) or 0.0


def shown(world):
    entry = world.adapters.service.entry("pirate", DEFAULT_TENANT)
    return report(world.monitor, world.validations, entry)


def test_quiet_traffic_raises_nothing_and_a_bad_spell_is_rolled_back(world):
    set_policy(world, Policy(Action.ROLLBACK))
    traffic(world, 700)
    found = shown(world)
    (version,) = found["versions"]
    assert version["requests"] == 700
    assert version["signals"]["output_tokens"]["reference"]["count"] == 96
    assert version["signals"]["output_tokens"]["state"] == "watched"
    assert version["signals"]["output_tokens"]["looks"] > 50
    assert found["alarms"] == []
    assert value(world, "manyhats_drift_score", adapter="pirate", signal="empty") < 1
    traffic(world, 120, bad=0.8, first=1000, seed=1)
    assert route(world).stable == 1
    assert audited(world) == [("drift", "rollback")]
    found = shown(world)
    assert "empty" in {alarm["finding"]["signal"] for alarm in found["alarms"]}
    alarm = next(a for a in found["alarms"] if a["finding"]["signal"] == "empty")
    assert {int(name[1:]) >= 1000 for name in alarm["examples"]} == {True}
    assert found["latch"]["holds"]
    assert value(world, "manyhats_drift_actions_total", adapter="pirate", action="rollback") == 1
    assert value(world, "manyhats_drift_alarms_total", adapter="pirate", signal="empty") == 1


def test_it_acts_again_only_after_a_human_has_promoted_and_it_has_waited(world):
    set_policy(world, Policy(Action.ROLLBACK, cool_down_s=1000))
    traffic(world, 200)
    traffic(world, 120, bad=0.9, first=1000)
    assert route(world).stable == 1
    traffic(world, 200, version=1)
    traffic(world, 200, version=1, bad=0.9, first=2000)
    assert route(world).stable == 1, "latched: nothing moves by itself now"
    world.adapters.service.rollouts.promote("pirate", DEFAULT_TENANT, HUMAN, 2)
    world.monitor.settle()
    traffic(world, 200, bad=0.9, first=3000)
    assert route(world).stable == 2, "it waits"
    assert shown(world)["latch"]["holds"] is False
    world.clock.now += 1001
    world.monitor.settle()
    assert route(world).stable == 1, "the alarm still stands, and it may act now"
    assert audited(world) == [("drift", "rollback"), ("me", "promote"), ("drift", "rollback")]
    assert shown(world)["latch"]["count"] == 2


def test_a_dry_run_changes_nothing_and_says_what_it_would_have(world):
    set_policy(world, Policy(Action.BASELINE, dry_run=True))
    traffic(world, 200)
    traffic(world, 120, bad=0.9, first=1000)
    assert route(world).stable == 2
    assert audited(world) == []
    assert value(world, "manyhats_drift_actions_total", adapter="pirate", action="dry_run") >= 1


@pytest.mark.parametrize("action", [Action.HOLD, Action.ROLLBACK])
def test_a_bad_canary_is_held_or_ended_before_it_has_had_many_requests(world, action):
    rollouts = world.adapters.service.rollouts
    set_policy(world, Policy(action))
    traffic(world, 300)
    rollouts.schedule("pirate", DEFAULT_TENANT, HUMAN, version=3, steps=(5.0, 50.0), step_s=3600.0)
    for i in range(32):
        traffic(world, 19, first=10_000 + 100 * i, seed=i)
        traffic(world, 1, version=3, bad=0.9, first=20_000 + i, seed=i)
        canary = route(world).canary
        if canary is None or canary.schedule.held:
            break
    assert i < 31
    assert route(world).stable == 2
    assert (route(world).canary is None) == (action is Action.ROLLBACK)
    step = "hold" if action is Action.HOLD else "rollback"
    assert audited(world)[-1] == ("drift", step)
    assert shown(world)["alarms"][0]["against"] == "stable"


def test_a_good_canary_goes_on(world):
    set_policy(world, Policy(Action.ROLLBACK))
    traffic(world, 300)
    world.adapters.service.rollouts.canary("pirate", DEFAULT_TENANT, HUMAN, version=3, percent=50.0)
    traffic(world, 300, version=3, seed=4)
    assert route(world).canary.version == 3
    versions = {v["role"]: v for v in shown(world)["versions"]}
    assert versions["canary"]["against_stable"]["empty"]["looks"] > 50


def test_a_restart_keeps_references_alarms_and_the_latch(world):
    set_policy(world, Policy(Action.ROLLBACK))
    traffic(world, 150)
    traffic(world, 120, bad=0.9, first=1000)
    before = shown(world)
    world.monitor.stop()
    with watching(world.adapters, world.home, world.clock) as again:
        again.adapters = world.adapters
        entry = world.adapters.service.entry("pirate", DEFAULT_TENANT)
        after = report(again.monitor, again.validations, entry)
        assert after["latch"] == before["latch"]
        assert after["alarms"] == before["alarms"]
        with again.monitor.lock:
            tracks = again.monitor.watch(ref_of(world.adapters, 2)).tracks
        assert tracks["empty"].reference.count == 96
        assert tracks["empty"].looks > 0, "what was spent stays spent"


def test_feedback_is_taken_from_who_asked_alone_and_counts(world):
    traffic(world, 130)
    for i in range(100):
        said = Feedback(f"r{i}", 1.0 if i < 40 else -1.0, "quality", "arr")
        assert world.monitor.feedback(DEFAULT_TENANT, said) == ref_of(world.adapters, 2)
    world.monitor.settle()
    with pytest.raises(NotFoundError, match="'r1' of yours"):
        world.monitor.feedback(TenantId("other"), Feedback("r1", 1.0))
    with pytest.raises(NotFoundError):
        world.monitor.feedback(DEFAULT_TENANT, Feedback("r99999", 1.0))
    assert value(world, "manyhats_feedback_total", adapter="pirate", label="negative") == 60
    found = shown(world)
    assert "feedback_score" in {a["finding"]["signal"] for a in found["alarms"]}
    assert found["versions"][0]["feedback"][-1]["comment"] == "arr"


def test_what_finds_no_room_is_dropped_and_counted(adapters, tmp_path):
    metrics = Metrics(10)
    settings = settings_of(**SMALL)
    drift = open_drift(
        settings, tmp_path / "d.sqlite", names=adapters.service,
        rollouts=adapters.service.rollouts, metrics=metrics.drift, decode=str,
    )  # fmt: skip
    lost = SimpleNamespace(monitor=drift.monitor, adapters=adapters)
    drift.monitor.settle = lambda: None
    traffic(lost, drift.monitor.options.queue + 7)
    drift.close()
    assert (
        metrics.registry.get_sample_value("manyhats_drift_dropped_total", {"reason": "queue"}) == 7
    )


def test_replicas_merge_their_references_through_redis(adapters, tmp_path, redis_url):
    shared = {"redis_url": SecretStr(redis_url)}
    clock = Clock()
    with (
        watching(adapters, tmp_path, clock, **shared) as one,
        watching(adapters, tmp_path, clock, **shared) as two,
    ):
        for number, each in enumerate((one, two)):
            each.adapters = adapters
            traffic(each, 60, seed=number)  # 58 each after the warm-up: too few alone
        clock.now += 61
        for each in (one, two):
            each.monitor.settle()
            each.monitor.settle()
        clock.now += 61
        one.monitor.settle()
        sketches = []
        for each in (one, two):
            with each.monitor.lock:
                found = each.monitor.watch(ref_of(adapters, 2)).references.frozen
            sketches.append(found["output_tokens"])
        assert [s.count for s in sketches] == [116, 116]
        assert sketches[0].dump() == sketches[1].dump()


def lane(tokens, prompt=0, *, other=True):
    return SimpleNamespace(
        logprobs=[-2.0] * prompt + [-1.0] * tokens,
        entropies=[0.5] * (prompt + tokens),
        divergences=[0.25] * tokens if other else [],
        agreements=[True] * tokens if other else [],
        hidden_mean=[0.0] * 8,
    )


def test_samples_are_scored_again_against_the_base_and_beside_stable(world):
    done = []
    asked = []

    async def compare(tenant, token_ids, start, adapters, others_from, kept):
        lanes = [str(a) if a else None for a in adapters]
        asked.append((len(token_ids), start, others_from, lanes, kept))
        if len(asked) == 3:
            raise QueueFullError("busy")
        count = len(token_ids) - start
        own, prompt = lane(count, other=False), start - others_from
        return [own, *(lane(count, prompt) for _ in adapters[1:])]

    ref = ref_of(world.adapters, 2)

    def sample(answer, stable=None):
        tokens = tuple(range(answer))
        kept = f"rows of {answer}" if stable else None
        finished = Finished(
            "r", DEFAULT_TENANT, ref, (1, 2, 3, 4), tokens, "a", Ending.STOP, kept=kept
        )
        return Sample(finished, stable)

    async def run():
        dropped = []
        told = asyncio.Event()

        def found(*each):
            done.append(each)
            if len(done) == 3:
                told.set()

        rescorer = Rescorer(compare, found, dropped.append, longest=10, waiting=4)
        for made in (sample(5), sample(8, ref), sample(4), sample(11), sample(6), sample(7)):
            rescorer.offer(made)
        async with rescorer.running():
            await told.wait()
        return dropped

    assert asyncio.run(run()) == ["too_long", "rescoring", "failed"]
    assert asked[0] == (9, 4, 1, ["pirate@2", None], None)
    assert asked[1] == (12, 4, 1, ["pirate@2", None, "pirate@2"], "rows of 8")
    first, second = done[0], done[1]
    assert len(first[1].kl) == len(first[1].other_logprobs) == len(first[1].own_logprobs) == 5
    assert (first[1].prompt_nll, second[1].prompt_nll) == (2.0, 2.0)
    assert len(second[2].kl) == 8
    for each in done:
        world.monitor.rescored(*each)
    world.monitor.settle()
    assert value(world, "manyhats_drift_samples_total", adapter="pirate", kind="rescored") == 2
    assert value(world, "manyhats_drift_samples_total", adapter="pirate", kind="canary") == 1


def test_the_share_of_samples_is_what_was_asked_for():
    taken = sum(is_sampled(f"cmpl-{i}", 0.02) for i in range(20_000))
    assert 300 < taken < 500
    assert not is_sampled("x", 0.0)
    assert is_sampled("x", 1.0)


def test_an_evaluation_is_run_again_when_its_period_is_over(world):
    started, reports = [], {}

    class Gates:
        async def start(self, name, tenant, version):
            started.append((name, tenant, version))
            rows = [{"measure": "calibration_error", "value": 0.1}]
            reports[version] = {"started": world.clock.now, "passed": True, "rows": rows}
            return {}

        def shown(self, name, tenant, version):
            return {"report": reports.get(version)}

    names, actor = world.adapters.service, world.monitor.actor
    again = Revalidation(Gates(), names, actor, world.validations, world.clock)
    asyncio.run(again.tick())
    assert started == [], "no policy asks for it"
    set_policy(world, Policy(revalidate_s=1000.0))
    for _ in range(3):
        asyncio.run(again.tick())
    assert started == [("pirate", DEFAULT_TENANT, 2)]
    world.clock.now += 999
    asyncio.run(again.tick())
    assert len(started) == 1
    world.clock.now += 1
    assert shown(world)["validation"]["stale"]
    asyncio.run(again.tick())
    asyncio.run(again.tick())
    assert len(started) == 2
    found = shown(world)["validation"]
    assert not found["stale"]
    assert [o["figures"] for o in found["series"]] == [{"calibration_error": 0.1}] * 2


def test_a_version_goes_stale_and_its_retirement_is_warned_of(world):
    set_policy(world, Policy(revalidate_s=100.0, retire_at=world.clock.now + 86400))
    traffic(world, 1)
    world.clock.now += 61
    world.monitor.settle()
    assert value(world, "manyhats_drift_stale", adapter="pirate") == 1
    world.clock.now -= 61
    found = shown(world)["validation"]
    assert found["stale"], "it was registered long before the clock's time"
    assert found["warnings"] == ["pirate@2 is to be replaced in 1.0 days"]
    entry = world.adapters.service.entry("pirate", DEFAULT_TENANT)
    world.validations.add(entry, 1, passed=True, by="me", figures={})
    world.validations.add(entry, 2, passed=False, by="me", figures={})
    assert shown(world)["validation"]["stale"], "another version's, or one that failed"
    world.validations.add(entry, 2, passed=True, by="me", figures={"nll": 1.5})
    assert not shown(world)["validation"]["stale"]
    world.clock.now += 101
    found = shown(world)["validation"]
    assert found["stale"]
    assert [o["passed"] for o in found["series"]] == [True, False, True]
