"""False alarms and requests until detection, over runs drawn from what ``record.py`` wrote.

    python loadtests/drift/replay.py values.json --runs 20

A run draws, with replacement, a reference and then traffic through the same ``Watch`` that the
server uses, at the server's default sizes and rate. Rescored signals come of every ``--every``-th
request alone (a share of 1 / every). It prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

from manyhats.config import Settings
from manyhats.drift.build import options_of
from manyhats.drift.detectors.spending import share
from manyhats.drift.signals import SIGNALS
from manyhats.drift.watch import Watch
from manyhats.types import AdapterRef, Digest

Values = dict[str, float | str]
HEALTHY = "healthy"


class Run:
    """One version's life in a run. ``canary`` is compared with ``stable``'s references."""

    def __init__(self, every: int, seed: int, stable: Watch | None = None) -> None:
        options = options_of(Settings())
        ref = AdapterRef("pirate", 1, Digest("0" * 64))
        self.watch = Watch(ref, options.alpha * share(1), options.sizes)
        self._stable = stable
        self._every = every
        self._rng = random.Random(seed)
        self._seen = 0

    def feed(self, pool: list[Values]) -> list[str]:
        """One request; the signals of its alarms."""
        self._seen += 1
        self.watch.seen += 1
        values = self._rng.choice(pool)
        sampled = self._seen % self._every == 0
        kept = {k: v for k, v in values.items() if sampled or not SIGNALS[k].sampled}
        if self._stable is not None:
            self.watch.compare_with(self._stable.references)
        found = self.watch.add(kept, float(self._seen), f"r{self._seen}")
        return [alarm.finding.signal for alarm in found]


def reference(pool: list[Values], every: int, seed: int) -> Run:
    """A version whose references are all frozen."""
    run = Run(every, seed)
    needed = options_of(Settings()).sizes
    for _ in range(max(needed.reference, needed.sampled * every) + needed.warm_up + 1):
        if run.feed(pool):
            raise SystemExit("an alarm before the references were frozen")
    return run


def until(run: Run, pool_at: Callable[[int], list[Values]], most: int) -> tuple[int | None, str]:
    """(requests until the first alarm, its signal); (None, "") within ``most``."""
    for number in range(1, most + 1):
        if found := run.feed(pool_at(number)):
            return number, found[0]
    return None, ""


def scenarios(pools: dict[str, list[Values]]):  # noqa: ANN201
    """(name, as a canary?, the pool of each request)."""

    def mixed(share: float, seed: int = 5) -> Callable[[int], list[Values]]:
        rng = random.Random(seed)
        return lambda _: pools["other-domain" if rng.random() < share else HEALTHY]

    def decaying(number: int) -> list[Values]:
        rng = random.Random(number)
        return pools["noise-4" if rng.random() < min(1.0, number / 3000) else HEALTHY]

    for name in pools:
        if name not in (HEALTHY, "other-domain"):
            yield f"{name}, as a canary", True, lambda _, name=name: pools[name]
            yield f"{name}, in place", False, lambda _, name=name: pools[name]
    if "other-domain" in pools:
        for part in (0.25, 0.5, 1.0):
            yield f"other domain, {part:.0%}", False, mixed(part)
    if "noise-4" in pools:
        yield "slow decay over 3,000 requests", False, decaying


def row(name: str, found: list[tuple[int | None, str]]) -> str:
    """A line of the table."""
    seen = [number for number, _ in found if number is not None]
    signals = [signal for number, signal in found if number is not None]
    middle = f"{statistics.median(seen):.0f}" if seen else ""
    worst = f"{max(seen)}" if seen else ""
    first = ", ".join(f"`{s}`" for s in sorted(set(signals), key=signals.count, reverse=True)[:3])
    return f"| {name} | {len(seen)} of {len(found)} | {middle} | {worst} | {first} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("values", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--most", type=int, default=3000)
    parser.add_argument("--every", type=int, default=50)
    given = parser.parse_args()
    pools = json.loads(given.values.read_text())
    print("| traffic | alarms | median requests | most | first signals |\n|---|---|---|---|---|")
    references = [reference(pools[HEALTHY], given.every, seed) for seed in range(given.runs)]
    saved = [run.watch for run in references]
    cases = [("unchanged", False, lambda _: pools[HEALTHY]), *scenarios(pools)]
    for name, canary, pool_at in cases:
        found = []
        for seed, stable in enumerate(saved):
            run = Run(5 if canary else given.every, 1000 + seed, stable if canary else None)
            if not canary:
                run.watch.use(stable.references)
                run.watch.seen = given.every
            found.append(until(run, pool_at, given.most))
        print(row(name, found), flush=True)


if __name__ == "__main__":
    main()
