"""From single measurements to what is kept.

Medians over rounds, ratios against the bars, a CSV file with its context.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench_stats import Summary

TIMES = (
    "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms",
    "tpot_p50_ms", "tpot_p99_ms", "latency_p50_ms", "latency_p99_ms",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell in one round.

    ``kind``: the adapters' shape. ``values``: a summary's figures by their names.
    """

    target: str
    kind: str
    concurrency: int
    adapters: int
    values: Mapping[str, float]

    @classmethod
    def of_summary(cls, target: str, kind: str, summary: Summary) -> Sample:
        """A sample of what ``serve_bench.run_cell`` gives."""
        numbers = {k: v for k, v in summary.as_dict().items() if isinstance(v, int | float)}
        return cls(target, kind, summary.concurrency, summary.adapters, numbers)


@dataclass(frozen=True, slots=True)
class Row:
    """One cell over all rounds.

    ``rates``: output tokens/s a round, in order; ``times``: medians, ms.
    """

    target: str
    kind: str
    concurrency: int
    adapters: int
    rates: tuple[float, ...]
    errors: int
    times: Mapping[str, float]
    peak_mib: float

    @property
    def rate(self) -> float:
        """Median output tokens/s."""
        return statistics.median(self.rates)

    @property
    def label(self) -> str:
        """The cell in words."""
        what = "base" if not self.adapters else f"{self.adapters} x {self.kind}"
        return f"{self.target}, {what}, {self.concurrency} in flight"


def reduce_rounds(samples: Sequence[Sample], peak_mib: Mapping[str, float]) -> list[Row]:
    """Medians over the rounds, in the order in which the cells first came."""
    groups: dict[tuple[str, str, int, int], list[Sample]] = {}
    for s in samples:
        groups.setdefault((s.target, s.kind, s.concurrency, s.adapters), []).append(s)
    return [
        Row(
            *key,
            rates=tuple(s.values["output_tok_s"] for s in group),
            errors=int(sum(s.values.get("errors", 0) for s in group)),
            times={
                name: statistics.median(s.values[name] for s in group)
                for name in TIMES
                if all(name in s.values for s in group)
            },
            peak_mib=peak_mib.get(key[0], float("nan")),
        )
        for key, group in groups.items()
    ]


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio that must be reached: the median over the rounds of one cell's rate by another's."""

    name: str
    ratio: float
    at_least: float

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.ratio >= self.at_least

    def __str__(self) -> str:
        verdict = "ok  " if self.met else "MISS"
        return f"{verdict} {self.ratio:6.3f} (at least {self.at_least}) {self.name}"


Key = tuple[str, str, int, int]


def bars(rows: Iterable[Row]) -> list[Bar]:
    """The bars that these rows allow to judge; both sides of each come from the same rounds."""
    cells: dict[Key, Row] = {(r.target, r.kind, r.concurrency, r.adapters): r for r in rows}
    if not cells:
        return []
    top = max(key[2] for key in cells)
    many = max(key[3] for key in cells)
    base: Key = ("manyhats", "none", top, 0)
    worst: Key = ("manyhats", "all-r16", top, many)
    wanted: list[tuple[str, Key, Key, float]] = [
        ("one adapter / base", ("manyhats", "all-r16", top, 1), base, 0.85),
        (f"{many} of rank 8 on q, v / base", ("manyhats", "qv-r8", top, many), base, 0.85),
        (f"{many} of rank 16 on all / base", worst, base, 0.5),
        (f"{many} of rank 16 / PEFT's mixed batch", worst, ("peft", *worst[1:]), 4.0),
    ]
    wanted = [(f"{name}, {top} in flight", up, down, least) for name, up, down, least in wanted]
    for concurrency in sorted({key[2] for key in cells}):
        plain: Key = ("manyhats-no-adapter-layers", "none", concurrency, 0)
        name = f"base / engine without adapter layers, {concurrency} in flight"
        wanted.append((name, ("manyhats", *plain[1:]), plain, 0.98))
    return [
        Bar(name, _median_ratio(cells[above], cells[below]), at_least)
        for name, above, below, at_least in wanted
        if above in cells and below in cells
    ]


def _median_ratio(above: Row, below: Row) -> float:
    return statistics.median(a / b for a, b in zip(above.rates, below.rates, strict=True))


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(started: datetime, args: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on: when, the command, the machine, the versions, the settings."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "loadtests/run_serve_bench.py", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "manyhats": _own_version(),
        **{name: _version(name) for name in packages},
        "model": args.model.name,
        "quantization": args.quantization,
        "dtype": args.dtype,
        "input_tokens": str(args.input_tokens),
        "output_tokens": str(args.output_tokens),
        "rounds": str(args.rounds),
    }


def _own_version() -> str:
    from manyhats import __version__

    return __version__


def write_csv(path: Path, rows: Iterable[Row], context: Mapping[str, str]) -> None:
    """One line a cell; the context is repeated on each, so that a line can stand alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_csv_fields(row) | {f"env_{k}": v for k, v in context.items()} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _csv_fields(row: Row) -> dict[str, str]:
    fields = {
        "target": row.target,
        "kind": row.kind,
        "concurrency": str(row.concurrency),
        "adapters": str(row.adapters),
        "output_tok_s": f"{row.rate:.2f}",
        "min": f"{min(row.rates):.2f}",
        "max": f"{max(row.rates):.2f}",
        "rounds_tok_s": " ".join(f"{rate:.2f}" for rate in row.rates),
        "errors": str(row.errors),
    }
    fields |= {name: f"{row.times[name]:.2f}" if name in row.times else "" for name in TIMES}
    return fields | {"peak_mib": "" if math.isnan(row.peak_mib) else f"{row.peak_mib:.0f}"}


def render(rows: Iterable[Row]) -> str:
    """The rows as text columns; times in ms."""
    titles = ("tok/s", "min", "max", "ttft p50", "ttft p99", "itl p50", "itl p99", "errors")
    lines = [" " * 60 + "".join(title.rjust(10) for title in titles)]
    for row in rows:
        times = [row.times.get(name, math.nan) for name in TIMES[:4]]
        figures = [row.rate, min(row.rates), max(row.rates), *times]
        cells = "".join(f"{figure:10.1f}" for figure in figures)
        lines.append(f"{row.label:<60}{cells}{row.errors:10d}")
    return "\n".join(lines)
