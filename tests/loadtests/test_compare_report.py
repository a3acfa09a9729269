"""The comparison's arithmetic: ratios round by round, the best peer as the bar, the plots."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
bars, cells, measured, plots, report, target = (
    importlib.import_module(f"compare.{name}")
    for name in ("bars", "cells", "measured", "plots", "report", "target")
)
peers = importlib.import_module("compare.peers")
bench_stats = importlib.import_module("bench_stats")


def cell(name: str, concurrency: int, adapters: int, *rates: float, first: int = 1) -> list[Any]:
    kind = "all-r16" if adapters else "none"
    return [
        measured.Measured(name, "matrix", kind, concurrency, adapters, number, {"output_tok_s": r})
        for number, r in enumerate(rates, first)
    ]


def test_a_ratio_is_of_the_rounds_that_both_sides_have() -> None:
    rows = report.rows_of([*cell("a", 8, 8, 10, 30, 50), *cell("b", 8, 0, 20, 100, first=2)])
    above, below = rows.values()
    made = report.ratio(above, below, "output_tok_s")
    assert made.by_round == (1.5, 0.5)
    assert made.median == 1.0
    assert report.ratio(above, below, "ttft_p50_ms") is None
    apart = report.rows_of([*cell("a", 8, 8, 10), *cell("b", 8, 0, 20, first=5)])
    assert report.ratio(*apart.values(), "output_tok_s") is None


def test_ratios_are_written_with_their_quantiles(tmp_path: Path) -> None:
    data = [
        *cell("manyhats", 8, 8, 10, 20, 60), *cell("vllm", 8, 0, 10, 10, 10),
        *cell("vllm-lora-8", 8, 8, 5, 5, 5), *cell("vllm-lora-8", 8, 1, 1, 1, 1),
    ]  # fmt: skip
    made = report.ratios(report.rows_of(data), "manyhats")
    assert {r.below[0]: r.median for r in made} == {"vllm": 2.0, "vllm-lora-8": 4.0}
    report.write_ratios(tmp_path / "ratios.csv", made, {"cpu": "x"})
    with (tmp_path / "ratios.csv").open(encoding="utf-8") as handle:
        first, second = csv.DictReader(handle)
    assert [first[f"q{q}"] for q in (0, 25, 50, 75, 100)] == [
        "1.0000", "1.5000", "2.0000", "4.0000", "6.0000"
    ]  # fmt: skip
    assert (second["below_target"], second["q50"], second["env_cpu"]) == (
        "vllm-lora-8", "4.0000", "x"
    )  # fmt: skip


def bar(**given: Any) -> Any:
    plain = {
        "figure": "output_tok_s",
        "bound": 2.0,
        "above": ("m", "matrix", "all-r16", 8, 8),
        "below": tuple((n, "matrix", "all-r16", 8, 8) for n in ("slow", "quick", "missing")),
    }
    return bars.Bar("a bar", **(plain | given))  # fmt: skip


def test_a_bar_counts_against_the_best_peer() -> None:
    rows = report.rows_of(
        [*cell("m", 8, 8, 30, 60, 90), *cell("slow", 8, 8, 3, 3, 3),
         *cell("quick", 8, 8, 20, 30, 30)]
    )  # fmt: skip
    found = bars.judge(bar(), rows)
    assert (found.value, found.low, found.high, found.against) == (2.0, 1.5, 3.0, "(quick)")
    assert found.met
    assert not bars.judge(bar(bound=2.1), rows).met
    most = bars.judge(bar(least=False, bound=9.0), rows)
    assert (most.value, most.met) == (20.0, False)
    assert str(most).startswith("MISS   20.000 [10.000, 30.000] (at most 9) a bar")


def test_a_figure_alone_is_held_to_its_bound_and_nothing_to_none() -> None:
    start = measured.Measured("m", "start", "none", 0, 4, 1, {"start_s": 9.5})
    rows = report.rows_of([start])
    alone = bar(above=start.key, below=(), figure="start_s", bound=10.0, least=False)
    assert bars.judge(alone, rows).met
    missing = bars.judge(bar(), rows)
    assert not missing.judged
    assert math.isnan(missing.value)
    assert str(missing).startswith("?    not measured (at least 2) a bar")


def test_every_bar_is_about_cells_that_targets_are_asked_for(tmp_path: Path) -> None:
    """A bar whose key nobody measures could never be missed."""
    place = target.Place(
        model=tmp_path, all_r16=tuple(tmp_path / f"a{i}" for i in range(128)),
        qv_r8=tuple(tmp_path / f"q{i}" for i in range(32)), peers=tmp_path, work=tmp_path,
    )  # fmt: skip
    options = cells.Options()
    names = [a.name for a in place.all_r16], [a.name for a in place.qv_r8]
    known = set()
    for one in peers.all_targets(place):
        known.add((one.name, "start", "none", 0, one.wears))
        for kind, made in cells.matrix(one, options, "base", *names):
            known.add((one.name, "matrix", kind, made.concurrency, made.adapters))
        if "slots" in one.scenarios:
            known |= {(one.name, "slots", cells.ZIPF, options.in_flight, s) for s in options.sizes}
        for scenario, kinds in (("cold", ("cold", "warm")), ("prefix", ("first", "second"))):
            if scenario in one.scenarios:
                known |= {(one.name, scenario, kind, 1, int(one.wears > 0)) for kind in kinds}
        if one.batch:
            known |= {
                (one.name, "matrix", "all-r16" if one.wears else "none", c, min(c, one.wears))
                for c in options.concurrencies
            }
    known |= {("manyhats", "registered", "qv-r1", 0, n) for n in options.registered}
    wanted = bars.bars(max(options.sizes), options.registered, options.in_flight, 128)
    assert len(wanted) > 25
    asked = {key for one in wanted for key in (one.above, *one.below)}
    assert asked - known == {("vllm-lora-8", "matrix", "all-r16", 32, 32)}, "it has 8 slots"


def test_percentiles_are_of_requests_that_ended_well() -> None:
    well = bench_stats.RequestResult("m", None, 1.0, [0.1, 0.2, 0.4], 1, 3)
    firsts, gaps = measured.latencies(
        [well, bench_stats.RequestResult("m", "HTTP 500", 1.0, [9.0, 99.0])]
    )
    assert (len(firsts), firsts[0], firsts[100]) == (101, 100.0, 100.0)
    assert (gaps[0], gaps[50], gaps[100]) == (100.0, 150.0, 200.0)
    assert measured.latencies([]) == ([], [])


def curves() -> list[Any]:
    data = [*cell("manyhats", 1, 1, 10, 12), *cell("manyhats", 8, 8, 40, 50),
            *cell("manyhats", 1, 0, 11, 13), *cell("vllm", 1, 0, 9, 9), *cell("vllm", 8, 0, 30, 20),
            *cell("manyhats", 8, 1, 44, 46)]  # fmt: skip
    zipf = [
        measured.Measured("manyhats", "slots", cells.ZIPF, 16, n, 1, {"output_tok_s": 90.0 - n})
        for n in (32, 64)
    ]
    timed = [
        measured.Measured("vllm", "matrix", "none", 8, 0, n, {"output_tok_s": 1.0},
                          [float(n + i) for i in range(101)], [1.0] * 101)
        for n in (4, 6)
    ]  # fmt: skip
    return [*data, *zipf, *timed]


def test_lines_are_the_medians_and_ranges_of_two_points_or_more() -> None:
    base, worn = plots.by_concurrency(report.rows_of(curves()[:-2]))
    assert base == {"vllm": [(1.0, 9, 9, 9), (8.0, 25, 20, 30)]}
    assert worn == {"manyhats": [(1.0, 11, 10, 12), (8.0, 45, 40, 50)]}
    assert plots.cdf(curves(), "ttft_ms", 8) == {"vllm, base": [5.0 + i for i in range(101)]}


def test_plots_are_drawn_for_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need manyhats[plots]")
    made = plots.draw(curves(), tmp_path)
    names = ("throughput-base", "throughput-adapters", "throughput-number-of-adapters")
    names += ("throughput-slots", "ttft-cdf", "inter-token-cdf")
    assert {path.name for path in made} == {f"compare-{name}.svg" for name in names}
    before = [path.read_bytes() for path in made]
    assert all(b"manyhats" in text or b"vllm" in text for text in before)
    assert [path.read_bytes() for path in plots.draw(curves(), tmp_path)] == before
