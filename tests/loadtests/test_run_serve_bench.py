"""The driver's matrix, its reduction to medians, and its bars; the measuring itself is replaced."""

from __future__ import annotations

import asyncio
import csv
import importlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
bench_report = importlib.import_module("bench_report")
bench_stats = importlib.import_module("bench_stats")
driver = importlib.import_module("run_serve_bench")

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 1234,
}


def row(target: str, kind: str, concurrency: int, adapters: int, *rates: float) -> Any:
    return bench_report.Row(target, kind, concurrency, adapters, rates, 0, {}, float("nan"))


def test_bars_take_the_median_of_each_round_s_ratio() -> None:
    rows = [
        row("manyhats", "none", 32, 0, 100, 200, 50),
        row("manyhats", "all-r16", 32, 1, 90, 160, 48),
        row("manyhats", "all-r16", 32, 32, 60, 98, 24),
        row("manyhats", "qv-r8", 32, 32, 85, 150, 45),
        row("peft", "all-r16", 32, 32, 20, 20, 10),
        row("manyhats-no-adapter-layers", "none", 32, 0, 100, 250, 50),
        row("manyhats", "none", 1, 0, 30, 30, 30),
        row("manyhats-no-adapter-layers", "none", 1, 0, 30, 31, 29),
    ]
    found = {bar.name: (bar.ratio, bar.met) for bar in bench_report.bars(rows)}
    assert found == {
        "one adapter / base, 32 in flight": (0.9, True),
        "32 of rank 8 on q, v / base, 32 in flight": (0.85, True),
        "32 of rank 16 on all / base, 32 in flight": (0.49, False),
        "32 of rank 16 / PEFT's mixed batch, 32 in flight": (3.0, False),
        "base / engine without adapter layers, 1 in flight": (1.0, True),
        "base / engine without adapter layers, 32 in flight": (1.0, True),
    }


def test_rounds_are_reduced_to_medians_in_the_order_of_the_cells() -> None:
    samples = [
        bench_report.Sample("m", "none", 8, 0, {"output_tok_s": rate, "errors": e, "itl_p50_ms": t})
        for rate, e, t in ((10.0, 0, 3.0), (30.0, 2, 9.0), (20.0, 1, 4.0))
    ]
    samples.insert(1, bench_report.Sample("p", "none", 8, 0, {"output_tok_s": 5.0}))
    first, second = bench_report.reduce_rounds(samples, {"m": 100.0})
    assert (first.rates, first.rate, first.errors) == ((10.0, 30.0, 20.0), 20.0, 3)
    assert (first.times, first.peak_mib) == ({"itl_p50_ms": 4.0}, 100.0)
    assert (second.target, second.errors, second.times) == ("p", 0, {})


class FakeServer:
    started: list[Any] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, flags: list[str], log: Path) -> None:
        self.flags, self.base_url, self.registered = flags, f"http://{log.stem}", []
        self.stopped = False
        self.started.append(self)

    async def wait_ready(self) -> float:
        return 1.0

    async def register(self, folders: list[Path]) -> None:
        self.registered = folders

    def peak_mib(self) -> float:
        return 7.0

    def stop(self) -> None:
        self.stopped = True


class FakePeer:
    def __init__(self, flags: list[str], log: Path) -> None:
        self.flags = flags

    def batch(self) -> dict[str, float]:
        return {"output_tok_s": 10.0}

    def stop(self) -> None:
        pass


def test_a_run_visits_every_cell_every_round_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[tuple[str, Any]] = []

    async def run_cell(load: Any, cell: Any) -> Any:
        if not cell.label.endswith("warm-up"):
            visited.append((load.base_url, cell))
        result = bench_stats.RequestResult("m", None, 1.0, [0.5, 1.0], 4, 4, "usage")
        return bench_stats.summarize(
            [result], concurrency=cell.concurrency, adapters=cell.adapters,
            wanted_tokens=4, duration_s=0.1, client_cpu_s=0.0,
        )  # fmt: skip

    async def nothing(*_: Any) -> list[str]:
        return ["the-base"]

    FakeServer.started = []
    for name, value in (
        ("run_cell", run_cell), ("warm_up", nothing), ("served_models", nothing),
        ("ServerProcess", FakeServer), ("LocalPeer", FakePeer),
    ):  # fmt: skip
        monkeypatch.setattr(driver, name, value)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    args = driver.parse(
        ["--model", str(tmp_path), "--work", str(tmp_path / "w"), "--rounds", "2",
         "--concurrency", "1,4", "--adapters", "0,1,3"]
    )  # fmt: skip
    kept: list[Any] = []
    rows = asyncio.run(driver.run(args, kept.append))
    assert len(kept) == 2
    assert kept[-1] == rows

    ours = [cell for url, cell in visited if url == "http://manyhats"]
    plain = [cell for url, cell in visited if url != "http://manyhats"]
    shape = [(c.concurrency, c.adapters) for c in ours[:7]]
    assert shape == [(1, 0), (1, 1), (1, 3), (4, 0), (4, 1), (4, 3), (4, 3)]
    assert len(ours) == 14
    assert [(c.concurrency, list(c.models)) for c in plain] == [
        (1, ["the-base"]),
        (4, ["the-base"]),
    ] * 2
    assert ours[6].models == [f"bench-qv-r8-{i:03d}" for i in range(3)]
    assert len({c.label for c in ours}) == 6, "a round's prompts are its own"
    server, without = FakeServer.started
    assert [f.name for f in server.registered] == [
        f"bench-{kind}-{i:03d}" for kind in ("all-r16", "qv-r8") for i in range(3)
    ]
    assert "--no-adapter-layers" in without.flags
    assert "--no-adapter-layers" not in server.flags
    assert server.stopped and without.stopped

    assert [
        (r.target, r.kind, len(r.rates)) for r in rows if r.target in ("peft", "transformers")
    ] == [
        ("transformers", "none", 2),
        ("peft", "all-r16", 2),
    ]
    out = tmp_path / "results" / "r.csv"
    bench_report.write_csv(out, rows, bench_report.environment(datetime.now(UTC), args))
    with out.open() as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == len(rows) == 11
    assert lines[0]["env_cores"] and lines[0]["env_cpu"] and lines[0]["env_torch"]
    assert (lines[0]["rounds_tok_s"], lines[0]["peak_mib"]) == ("40.00 40.00", "7")
    assert bench_report.render(rows).count("\n") == 11
