"""One measurement, and the file that keeps every one as it comes (a JSON object a line).

The file is what a run that was cut short goes on from, and what tables and plots are made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from bench_stats import RequestResult, Summary, percentile

START = "start"
NAMES = ("target", "scenario", "kind", "concurrency", "adapters")
"""What names a cell."""
PERCENTS = tuple(range(101))


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell of one scenario on one target in one round.

    ``kind``: which adapters. ``values``: figures by name (``bench_stats.Summary``'s, or the
    scenario's own). ``ttft_ms``, ``itl_ms``: percentiles 0, 1, ..., 100, or nothing.
    """

    target: str
    scenario: str
    kind: str
    concurrency: int
    adapters: int
    round: int
    values: Mapping[str, float]
    ttft_ms: Sequence[float] = ()
    itl_ms: Sequence[float] = ()

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """The cell, whatever the round."""
        return (self.target, self.scenario, self.kind, self.concurrency, self.adapters)


def numbers(summary: Summary) -> dict[str, float]:
    """A summary's figures."""
    return {k: float(v) for k, v in summary.as_dict().items() if isinstance(v, int | float)}


def latencies(results: Iterable[RequestResult]) -> tuple[list[float], list[float]]:
    """Percentiles of the time to first token and of the gaps between tokens, ms; see Measured."""
    timed = [r for r in results if r.error is None and r.events]
    firsts = [1000 * r.events[0] for r in timed]
    gaps = [1000 * (b - a) for r in timed for a, b in pairwise(r.events)]
    return _percentiles(firsts), _percentiles(gaps)


def _percentiles(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [round(percentile(ordered, q), 3) for q in PERCENTS] if ordered else []


@dataclass(slots=True)
class Kept:
    """What a run has found out so far.

    ``skipped``: why a target is left out. ``context``: what the figures depend on.
    """

    measured: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    context: dict[str, str] = field(default_factory=dict)

    def visited(self, target: str, number: int) -> bool:
        """Whether a target's round is whole: its start is noted last."""
        return any(m.scenario == START and (m.target, m.round) == (target, number)
                   for m in self.measured)  # fmt: skip


class Store:
    """The file. A visit's lines are written at once, at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> Kept:
        """All that it holds; empty where it is not there. Raises ValueError for a broken line."""
        kept = Kept()
        if not self._path.exists():
            return kept
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self._path}, line {number}: {error}") from error
            if "context" in value:
                kept.context = value["context"]
            elif "skipped" in value:
                kept.skipped[value["skipped"]] = value["reason"]
            else:
                kept.measured.append(Measured(**value))
        there = {one.target for one in kept.measured}  # it was left out once, and works now
        kept.skipped = {name: why for name, why in kept.skipped.items() if name not in there}
        return kept

    def visit(self, measured: Iterable[Measured]) -> None:
        """Keeps a visit's measurements."""
        self._append([asdict(one) for one in measured])

    def skip(self, target: str, reason: str) -> None:
        """Keeps why a target is left out."""
        self._append([{"skipped": target, "reason": reason}])

    def context(self, context: Mapping[str, str]) -> None:
        """Keeps what the figures depend on."""
        self._append([{"context": dict(context)}])

    def _append(self, values: Iterable[object]) -> None:
        text = "".join(json.dumps(value) + "\n" for value in values)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(text)
