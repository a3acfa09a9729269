"""From measurements to tables: medians and quantiles over the rounds, ratios, CSV."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_stats import percentile
from compare.measured import NAMES, START, Kept, Measured

Key = tuple[str, str, str, int, int]
FIGURES = (
    "output_tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "tpot_p50_ms",
    "latency_p99_ms", "popular_itl_p99_ms", "start_s", "ready_mib", "memory_mib", "pace_gb_s",
    "client_cpu", "late_p99_ms", "errors",
)  # fmt: skip
QUANTILES = (0, 25, 50, 75, 100)


@dataclass(frozen=True, slots=True)
class Row:
    """A cell over all rounds: its measurements by round."""

    key: Key
    rounds: Mapping[int, Measured]

    def value(self, figure: str, number: int) -> float:
        """A figure in one round; nan where there is none."""
        return self.rounds[number].values.get(figure, math.nan)

    def median(self, figure: str) -> float:
        """Over the rounds that have it; nan where none has."""
        given = [v for n in self.rounds if not math.isnan(v := self.value(figure, n))]
        return statistics.median(given) if given else math.nan

    @property
    def errors(self) -> int:
        """Failed requests of all rounds."""
        return int(sum(m.values.get("errors", 0) for m in self.rounds.values()))


def rows_of(measured: Iterable[Measured]) -> dict[Key, Row]:
    """Cells in the order in which they first came; a round measured twice counts as its last."""
    grouped: dict[Key, dict[int, Measured]] = {}
    for one in measured:
        grouped.setdefault(one.key, {})[one.round] = one
    return {key: Row(key, rounds) for key, rounds in grouped.items()}


@dataclass(frozen=True, slots=True)
class Ratio:
    """One cell's figure by another's, round by round: both sides come from the same rounds."""

    above: Key
    below: Key
    figure: str
    by_round: tuple[float, ...]

    @property
    def median(self) -> float:
        """What counts."""
        return statistics.median(self.by_round)


def ratio(above: Row, below: Row, figure: str) -> Ratio | None:
    """None where no round has both."""
    both = sorted(above.rounds.keys() & below.rounds.keys())
    values = [above.value(figure, n) / v for n in both if (v := below.value(figure, n))]
    values = [v for v in values if not math.isnan(v)]
    return Ratio(above.key, below.key, figure, tuple(values)) if values else None


def ratios(rows: Mapping[Key, Row], ours: str) -> list[Ratio]:
    """Every cell of ours by every other target's of the same scenario and concurrency, where that
    has as many adapters, or none.
    """
    found = []
    for above in rows.values():
        if above.key[0] != ours or above.key[1] == START:
            continue
        for below in rows.values():
            same = above.key[1] == below.key[1] and above.key[3] == below.key[3]
            if below.key[0] == ours or not same or below.key[4] not in (0, above.key[4]):
                continue
            for figure in ("output_tok_s", "ttft_p50_ms", "itl_p50_ms", "itl_p99_ms"):
                made = ratio(above, below, figure)
                if made is not None:
                    found.append(made)
    return found


def write_cells(path: Path, kept: Kept) -> None:
    """A line a cell: the median of each figure, its quantiles over the rounds, the context; then a
    line a target that was left out, with the reason.
    """
    lines = []
    for row in rows_of(kept.measured).values():
        line = dict(zip(NAMES, map(str, row.key), strict=True))
        line |= {"rounds": str(len(row.rounds)), "skipped": ""}
        for figure in FIGURES:
            values = [v for n in row.rounds if not math.isnan(v := row.value(figure, n))]
            line[figure] = f"{statistics.median(values):.3f}" if values else ""
            line[f"{figure}_rounds"] = " ".join(f"{v:.3f}" for v in values)
        lines.append(line)
    lines += [{"target": name, "skipped": why} for name, why in kept.skipped.items()]
    _write(path, lines, kept.context)


def write_ratios(path: Path, made: Sequence[Ratio], context: Mapping[str, str]) -> None:
    """A line a ratio: median and quantiles over the rounds."""
    lines = []
    for one in made:
        line = {f"above_{n}": str(v) for n, v in zip(NAMES, one.above, strict=True)}
        line |= {f"below_{n}": str(v) for n, v in zip(NAMES, one.below, strict=True)}
        line |= {"figure": one.figure, "rounds": str(len(one.by_round))}
        line |= {f"q{q}": f"{percentile(one.by_round, q):.4f}" for q in QUANTILES}
        lines.append(line)
    _write(path, lines, context)


def _write(path: Path, lines: Sequence[dict[str, str]], context: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for line in lines for name in line))
    names += [f"env_{name}" for name in context]
    given = {f"env_{name}": value for name, value in context.items()}
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=names, restval="")
        writer.writeheader()
        writer.writerows(line | given for line in lines)


def render(kept: Kept) -> str:
    """The cells as text columns; times in ms."""
    titles = ("tok/s", "min", "max", "ttft p50", "ttft p99", "itl p50", "itl p99", "errors")
    lines = ["".ljust(58) + "".join(title.rjust(10) for title in titles)]
    for row in rows_of(kept.measured).values():
        target, scenario, kind, concurrency, adapters = row.key
        if scenario == START:
            line = f"{target}, start".ljust(58)
            line += f"{row.median('start_s'):10.1f} s {row.median('memory_mib'):10.0f} MiB"
            lines.append(f"{line} {row.median('pace_gb_s'):10.1f} GB/s")
            continue
        what = f"{target}, {scenario}, {adapters} x {kind}, {concurrency} in flight"
        rates = [row.value("output_tok_s", n) for n in row.rounds]
        cells = [row.median("output_tok_s"), min(rates), max(rates)]
        cells += [row.median(f) for f in FIGURES[1:5]]
        lines.append(what.ljust(58) + "".join(f"{c:10.1f}" for c in cells) + f"{row.errors:10d}")
    lines += [f"{name}: skipped: {why}" for name, why in kept.skipped.items()]
    return "\n".join(lines)
