"""Generated workloads have the statistics that were asked for, and traces are read or refused."""

from __future__ import annotations

import asyncio
import csv
import importlib
import json
import math
import random
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_openai import FakeServer, running

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
workload = importlib.import_module("workload")
traces = importlib.import_module("traces")
serve_bench = importlib.import_module("serve_bench")
bench_arrivals = importlib.import_module("bench_arrivals")


def gaps_of(requests: list[Any]) -> list[float]:
    return [b.at_s - a.at_s for a, b in pairwise(requests)]


@pytest.mark.parametrize("cv", [0.25, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_variation_that_were_asked_for(cv: float) -> None:
    asked = workload.Workload(adapters=5, rate=40.0, cv=cv, duration_s=1000.0, seed=3)
    requests = workload.generate(asked)
    gaps = gaps_of(requests)
    n = len(gaps)
    # Five standard errors; that of the rate is cv / sqrt(n).
    assert n / 1000.0 == pytest.approx(40.0, rel=5 * cv / math.sqrt(n))
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.06)
    assert requests[0].at_s > 0
    assert requests[-1].at_s < 1000.0


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.4])
def test_popularity_follows_the_power_law(alpha: float, pooled: bool) -> None:
    asked = workload.Workload(
        adapters=24, alpha=alpha, rate=500.0, duration_s=200.0, pooled=pooled, seed=11
    )
    counts = Counter(r.adapter for r in workload.generate(asked))
    assert set(counts) == set(range(24))
    # The exponent is the slope of log(count) over log(rank), by least squares weighted by count.
    points = [(math.log(i + 1), math.log(c), c) for i, c in counts.items()]
    total = sum(w for *_, w in points)
    mx, my = (sum(p[i] * p[2] for p in points) / total for i in (0, 1))
    slope = sum(w * (x - mx) * (y - my) for x, y, w in points) / sum(
        w * (x - mx) ** 2 for x, _, w in points
    )
    assert -slope == pytest.approx(alpha, abs=0.03)


def test_adapters_of_their_own_arrive_in_order_and_add_up_to_the_rate() -> None:
    asked = workload.Workload(adapters=50, rate=60.0, cv=4.0, duration_s=500.0, pooled=False)
    gaps = gaps_of(workload.generate(asked))
    assert min(gaps) >= 0
    assert len(gaps) / 500.0 == pytest.approx(60.0, rel=0.15)
    # Many processes together are less bursty than each: the reason for ``pooled``.
    assert pstdev(gaps) / fmean(gaps) < 3.0


@given(
    st.builds(
        workload.Workload,
        adapters=st.integers(0, 30),
        alpha=st.floats(0, 3),
        rate=st.floats(0.5, 20),
        cv=st.floats(0.2, 4),
        duration_s=st.floats(0.5, 20),
        input_tokens=st.tuples(st.integers(1, 9), st.integers(9, 30)),
        output_tokens=st.tuples(st.integers(1, 9), st.integers(9, 30)),
        pooled=st.booleans(),
        seed=st.integers(0, 2**32),
    )
)
def test_a_workload_is_repeatable_and_within_its_bounds(asked: Any) -> None:
    requests = workload.generate(asked)
    assert requests == workload.generate(asked)
    for request in requests:
        assert 0 <= request.at_s < asked.duration_s
        assert asked.input_tokens[0] <= request.input_tokens <= asked.input_tokens[1]
        assert asked.output_tokens[0] <= request.output_tokens <= asked.output_tokens[1]
        assert request.adapter is None if asked.adapters == 0 else request.adapter < asked.adapters


def test_both_ends_of_a_range_of_lengths_occur() -> None:
    asked = workload.Workload(rate=50, duration_s=20, input_tokens=(3, 5), output_tokens=(7, 7))
    requests = workload.generate(asked)
    assert {r.input_tokens for r in requests} == {3, 4, 5}
    assert {r.output_tokens for r in requests} == {7}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapters", -1),
        ("alpha", -0.1),
        ("rate", 0),
        ("cv", math.inf),
        ("duration_s", -1),
        ("input_tokens", (0, 5)),
        ("output_tokens", (6, 5)),
    ],
)
def test_a_field_out_of_its_bound_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        workload.Workload(**{field: value})


def parsed(text: str) -> list[Any]:
    return traces.parse_trace(csv.DictReader(text.splitlines()))


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:17:02.2224670,879,55
"""
OWN = """adapter,output_tokens,input_tokens,note,at_s
blue,3,10,x,5
,4,11,"two
lines",5.5
red,5,12,x,5.5
blue,6,13,x,9
"""


def test_a_trace_of_azure_starts_with_its_first_row() -> None:
    requests = parsed(AZURE)
    assert [r.at_s for r in requests] == pytest.approx([0.0, 4.314579, 75.541877], abs=1e-5)
    assert [(r.adapter, r.input_tokens, r.output_tokens) for r in requests] == [
        (None, 374, 44),
        (None, 396, 109),
        (None, 879, 55),
    ]


def test_labels_of_a_trace_become_adapters_in_the_order_of_their_appearance() -> None:
    requests = parsed(OWN)
    assert [r.at_s for r in requests] == [0.0, 0.5, 0.5, 4.0]
    assert [r.adapter for r in requests] == [0, None, 1, 0]
    assert [r.input_tokens for r in requests] == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: column at_s or TIMESTAMP is missing"),
        ("at_s,input_tokens\n1,2\n", "row 1: column output_tokens or GeneratedTokens is missing"),
        (
            AZURE.replace("TIMESTAMP", "at_s,TIMESTAMP", 1),
            "row 1: column at_s or .* is there twice",
        ),
        ("at_s,input_tokens,output_tokens\n", "the trace has no rows"),
        (AZURE.replace(",396,", ",0,"), "row 3, column ContextTokens: must be a whole .* got '0'"),
        (AZURE.replace(",55", ",5.5"), "row 4, column GeneratedTokens: .* got '5.5'"),
        (AZURE.replace(",55", ""), "row 4, column GeneratedTokens: .* got ''"),
        (
            AZURE.replace("2023-11-16 18:17", "yesterday"),
            "row 4, column TIMESTAMP: must be seconds",
        ),
        (AZURE.replace("18:17", "18:14"), "row 4, column TIMESTAMP: .* is before the row above"),
        (OWN.replace("x,9", "x,nan"), "row 6, column at_s: must be finite"),
    ],
)
def test_what_is_wrong_in_a_trace_is_named_by_row_and_column(text: str, message: str) -> None:
    with pytest.raises(traces.TraceError, match=f"^{message}"):
        parsed(text)


def test_a_trace_is_cut_sped_up_and_spread_over_adapters() -> None:
    requests = traces.adapted(parsed(AZURE), speed=2.0, first_s=60.0, max_input=380)
    assert [r.at_s for r in requests] == pytest.approx([0.0, 2.1572895], abs=1e-5)
    assert [r.input_tokens for r in requests] == [374, 380]
    assert [r.output_tokens for r in requests] == [44, 109]
    spread = traces.spread(requests * 200, 3, 2.0, seed=5)
    counts = Counter(r.adapter for r in spread)
    assert [counts[i] / 400 for i in range(3)] == pytest.approx([0.735, 0.184, 0.082], abs=0.06)
    with pytest.raises(ValueError, match="speed must be positive"):
        traces.adapted(requests, speed=0.0)


def played(fake: Any, tmp_path: Path, *flags: str) -> dict[str, Any]:
    out = tmp_path / "out.json"

    async def go() -> int:
        async with running(fake) as url:
            given = ["--base-url", url, "--json", str(out), "--no-progress", *flags]
            return await asyncio.to_thread(serve_bench.main, given)

    assert asyncio.run(go()) == 0
    return json.loads(out.read_text())["cells"][0]


def test_a_generated_workload_is_played_as_it_was_drawn(tmp_path: Path) -> None:
    fake = FakeServer()
    flags = "--arrivals slora --rate 100 --duration-s 0.3 --input-range 3-9 --output-range 2-5"
    cell = played(fake, tmp_path, *flags.split(), "--seed", "7", "--ignore-eos")
    asked = workload.Workload(
        adapters=2, rate=100, duration_s=0.3, input_tokens=(3, 9), output_tokens=(2, 5), seed=7
    )
    drawn = workload.generate(asked)
    names = ["a-one", "b-two"]
    wanted = Counter((names[r.adapter], r.input_tokens, r.output_tokens) for r in drawn)
    bodies = fake.bodies[1:]  # the first warms up
    assert Counter((b["model"], len(b["prompt"]), b["max_tokens"]) for b in bodies) == wanted
    assert len({tuple(b["prompt"]) for b in bodies}) == len(bodies), "no prompt comes twice"
    assert (cell["requests"], cell["errors"], cell["short"]) == (len(drawn), 0, 0)
    assert cell["output_tokens"] == sum(r.output_tokens for r in drawn)
    assert cell["duration_s"] >= drawn[-1].at_s
    assert {m: v[0] for m, v in cell["by_model"].items()} == Counter(
        names[r.adapter] for r in drawn
    )


def test_requests_do_not_wait_for_earlier_answers(tmp_path: Path) -> None:
    """An open loop: all ten are in flight before the first is answered."""
    release = asyncio.Event()

    class Slow(FakeServer):
        async def _stream(self, writer: Any, body: Any, mood: str) -> bool:
            if self.in_flight == 10:
                release.set()
            await release.wait()
            return await super()._stream(writer, body, mood)

    trace = tmp_path / "trace.csv"
    rows = "".join(f"{0.001 * i},{i + 1},2,{'ab'[i % 2]}\n" for i in range(10))
    trace.write_text(f"at_s,input_tokens,output_tokens,adapter\n{rows}")
    fake = Slow()
    cell = played(fake, tmp_path, "--arrivals", str(trace), "--no-warm-up")
    assert (cell["requests"], cell["errors"], cell["concurrency"]) == (10, 0, 10)
    assert sorted(len(b["prompt"]) for b in fake.bodies) == list(range(1, 11))
    assert Counter(b["model"] for b in fake.bodies) == {"a-one": 5, "b-two": 5}


def test_a_workload_that_the_server_has_too_few_adapters_for_is_refused() -> None:
    requests = [workload.TimedRequest(0.0, 2, 1, 1)]
    with pytest.raises(ValueError, match="has 3 adapters; the server lists 2"):
        workload.named(requests, "base", ["a", "b"])


def test_the_choice_of_an_adapter_depends_on_the_generator_alone() -> None:
    choice = workload.AdapterChoice(9, 1.0)
    assert [choice.draw(random.Random(4)) for _ in range(3)] == [choice.draw(random.Random(4))] * 3
