"""Which replica answers: every router agrees, little moves, adapters stay where they are."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.fleet.affinity import adapter_key, may_repeat, ranking

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
workload = importlib.import_module("workload")

REPLICAS = [f"replica-{i}" for i in range(5)]


@given(st.text(), st.lists(st.text(), max_size=8), st.randoms())
def test_the_ranking_has_every_replica_once_whoever_asks(
    key: str, replicas: list[str], rng: random.Random
) -> None:
    ranked = ranking(key, replicas)
    assert sorted(ranked) == sorted(set(replicas))
    rng.shuffle(replicas)
    assert ranking(key, replicas) == ranked


@given(st.text(), st.sets(st.text(), min_size=1, max_size=8), st.data())
def test_a_replica_that_goes_moves_only_what_it_had(
    key: str, replicas: set[str], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(replicas)))
    before = ranking(key, replicas)
    assert ranking(key, replicas - {gone}) == [name for name in before if name != gone]


def test_adapters_are_spread_evenly_and_over_all_second_choices() -> None:
    ranked = [ranking(f"hat-{i}", REPLICAS) for i in range(5000)]
    first = Counter(r[0] for r in ranked)
    assert all(850 < first[name] < 1150 for name in REPLICAS), first  # 1000, five deviations of 28
    second = Counter((r[0], r[1]) for r in ranked)
    assert len(second) == 20
    assert min(second.values()) > 150, "who is spilled does not go to one neighbour"


def loads(route: Callable[[str], str], slots: int) -> int:
    """Adapters loaded by five replicas of so many slots, each with the least recently used going,
    over S-LoRA's workload of 100 adapters.
    """
    resident: dict[str, OrderedDict[str, None]] = {name: OrderedDict() for name in REPLICAS}
    count = 0
    asked = workload.Workload(adapters=100, alpha=0.5, rate=20, duration_s=300, seed=2)
    for request in workload.generate(asked):
        hat = f"hat-{request.adapter}"
        there = resident[route(hat)]
        count += hat not in there
        there[hat] = None
        there.move_to_end(hat)
        if len(there) > slots:
            there.popitem(last=False)
    return count


def test_affinity_loads_each_adapter_about_once_where_chance_loads_it_again_and_again() -> None:
    rng = random.Random(1)
    by_chance = loads(lambda _: rng.choice(REPLICAS), slots=32)
    affine = loads(lambda hat: ranking(hat, REPLICAS)[0], slots=32)
    assert affine == 100
    assert by_chance > 20 * affine


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("path", "sent", "key"),
    [
        ("/v1/completions", body(model="pirate", prompt="x"), "pirate"),
        ("/v1/chat/completions", body(messages=[], model="pirate@3"), "pirate@3"),
        ("/v1/completions", body(model="the-base"), ""),
        ("/v1/completions", body(prompt="x"), ""),
        ("/v1/completions", body(model=["pirate"]), ""),
        ("/v1/completions", b'["pirate"]', ""),
        ("/v1/completions", b"{not json", ""),
        ("/v1/completions", b"", ""),
        ("/v1/load_lora_adapter", body(model="pirate"), ""),
    ],
)
def test_the_key_is_what_the_request_wears(path: str, sent: bytes, key: str) -> None:
    assert adapter_key(path, sent, "the-base") == key


def test_compositions_have_keys_of_their_own_whatever_the_order_of_their_fields() -> None:
    one = b'{"model": "b", "adapter": {"stack": ["x", "y"], "weights": [1, 2]}}'
    other = b'{"adapter": {"weights": [1, 2], "stack": ["x", "y"]}, "model": "b"}'
    turned = b'{"model": "b", "adapter": {"stack": ["y", "x"], "weights": [1, 2]}}'
    keys = [adapter_key("/v1/completions", sent, "b") for sent in (one, other, turned)]
    assert keys[0] == keys[1] != keys[2]
    assert "" not in keys


def test_what_changes_something_is_sent_once() -> None:
    assert may_repeat("GET", "/admin/adapters")
    assert may_repeat("POST", "/v1/chat/completions")
    assert not may_repeat("POST", "/admin/adapters")
    assert not may_repeat("DELETE", "/admin/adapters/pirate")
