"""The reference of the evaluation set: fixed once requests are routed, shown, raising no alarm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.adapter_service import open_adapters, write_adapter

from manyhats.drift.archive import Archive
from manyhats.drift.evaluated import EvaluationReferences, compared
from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import SIGNALS
from manyhats.drift.store_sqlite import SqliteDriftStore
from manyhats.drift.watch import ident
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.evaluation.run import Plan, ScoredPair
from manyhats.lifecycle.records import Registration
from manyhats.types import DEFAULT_TENANT


@pytest.fixture
def world(tmp_path):
    """pirate@1 is stable, pirate@2 is not routed to."""
    store = SqliteDriftStore(tmp_path / "drift.sqlite")
    with open_adapters(tmp_path / "home") as opened:
        for seed in (0, 1):
            told = Registration(promote=seed == 0)
            folder = write_adapter(opened.root / f"p{seed}", seed)
            opened.service.register_folder(
                "pirate", str(folder), tenant=DEFAULT_TENANT, registration=told
            )
        archive = Archive(store)
        names = opened.service
        taken = EvaluationReferences(archive, names, lambda ids: "слово" if ids[0] else "word")
        yield SimpleNamespace(archive=archive, names=names, take=taken.take)
    store.close()


def plan_of(world, version):
    ref = world.names.get(f"pirate@{version}", DEFAULT_TENANT).ref
    return Plan(DEFAULT_TENANT, ref, None, (), (), ())


def pair(prompt, answer, kl):
    """A pair of so many tokens, the base's lane ``kl`` nats away."""
    own = SimpleNamespace(
        logprobs=[-1.0] * answer, entropies=[2.0] * answer, divergences=[], agreements=[],
        hidden_mean=[0.0],
    )  # fmt: skip
    base = SimpleNamespace(
        logprobs=[-3.0] * answer, entropies=[2.0] * answer, divergences=[kl] * answer,
        agreements=[False] * answer, hidden_mean=[0.0],
    )  # fmt: skip
    return ScoredPair(tuple(range(prompt + answer)), prompt, (own, base))


def kept(world, version):
    return world.archive.evaluation(ident(plan_of(world, version).candidate))


def test_the_signals_of_the_pairs_are_kept(world):
    world.take(plan_of(world, 1), [])
    assert kept(world, 1) == {}
    world.take(plan_of(world, 1), [pair(5, 4, 0.5), pair(7, 8, 1.5)])
    found = kept(world, 1)
    assert {name: sketch.count for name, sketch in found.items()} == dict.fromkeys(found, 2)
    means = {n: s.mean for n, s in found.items() if s.numbers}
    expected = {"kl": 1.0, "agreement": 0.0, "logprob_gap": 2.0, "answer_nll": 3.0,
                "mean_logprob": -1.0, "mean_entropy": 2.0, "output_tokens": 6.0,
                "prompt_tokens": 6.0, "repetition": 0.0, "distinct_ratio": 1.0}  # fmt: skip
    assert means == pytest.approx(expected, abs=1e-5)
    assert found["script"].categories == {"latin": 2}
    assert "finish_reason" not in found


def test_it_is_replaced_until_requests_are_routed_to_the_version(world):
    for answer in (3, 9):
        world.take(plan_of(world, 2), [pair(4, answer, 0.5)])
    assert kept(world, 2)["output_tokens"].mean == pytest.approx(9)
    world.names.rollouts.canary("pirate", DEFAULT_TENANT, Cause("me", ""), version=2, percent=5)
    world.take(plan_of(world, 2), [pair(4, 3, 0.5)])
    assert kept(world, 2)["output_tokens"].mean == pytest.approx(9), "frozen"


def sketch(name, values):
    made = SignalSketch(SIGNALS[name])
    for value in values:
        made.add(value)
    return made


def test_what_comes_is_compared_with_it():
    few, many = [float(5 + i % 3) for i in range(60)], [float(500 + i % 90) for i in range(200)]
    same, apart = (compared(sketch("prompt_tokens", few), sketch("prompt_tokens", v)) for v in
                   (few, many))  # fmt: skip
    assert (same["statistic"], same["log_p"]) == (0, 0)
    assert apart["statistic"] == 1
    assert apart["log_p"] < -50
    assert apart["psi"] > same["psi"]
    latin, mixed = ["latin"] * 40, ["latin"] * 20 + ["cyrillic"] * 60
    found = compared(sketch("script", latin), sketch("script", mixed))
    assert found["log_p"] < -20
    assert found["statistic"] > 0
    assert compared(sketch("kl", []), sketch("kl", [1.0])) == {}
