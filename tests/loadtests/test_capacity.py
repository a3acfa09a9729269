"""The capacity model's hit rates against a cache that is simulated, and its arithmetic by hand."""

from __future__ import annotations

import importlib
import random
import sys
from collections import OrderedDict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
capacity = importlib.import_module("capacity")
workload = importlib.import_module("workload")


def simulated(adapters: int, alpha: float, slots: int) -> float:
    choice, rng = workload.AdapterChoice(adapters, alpha), random.Random(3)
    there: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in range(40_000):
        adapter = choice.draw(rng)
        hits += number >= 10_000 and adapter in there
        there[adapter] = None
        there.move_to_end(adapter)
        if len(there) > slots:
            there.popitem(last=False)
    return hits / 30_000


@pytest.mark.parametrize(
    ("adapters", "alpha", "slots"), [(200, 1.0, 32), (200, 0.0, 50), (1000, 0.7, 64), (50, 2.0, 4)]
)
def test_hits_are_those_of_a_simulated_cache(adapters: int, alpha: float, slots: int) -> None:
    expected = capacity.lru_hit(workload.popularity(adapters, alpha), slots)
    assert expected == pytest.approx(simulated(adapters, alpha, slots), abs=0.015)


def test_with_a_slot_for_each_nothing_is_ever_missed() -> None:
    assert capacity.lru_hit(workload.popularity(8, 1.0), 8) == 1.0


def test_a_plan_is_its_own_arithmetic() -> None:
    given = capacity.Assumptions(
        request_s=0.02, output_tokens=100, tokens_s=200.0, busy=0.5, slots=10, adapter_mb=2.0
    )
    plan = capacity.plan(1000, given)
    assert plan.rate == pytest.approx(20.0)
    assert plan.replicas == 20  # 2000 tokens/s over 100 each
    assert plan.replica_mb == given.base_mb + given.kv_mb + 40
    assert plan.disk_mb == 2000
    assert plan.hit > plan.hit_random
    assert plan.loads_s == pytest.approx((1 - plan.hit) * 1.0)


def test_the_table_has_a_line_for_each_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main(["--tenants", "10,500", "--slots", "16"]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {8}
    assert [row.split("|")[1].strip() for row in rows] == ["10", "500"]
