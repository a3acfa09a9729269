"""False alarms and requests until detection, over runs drawn from what ``record.py`` wrote.

    python loadtests/drift/replay.py values.json --runs 20 --plot detection.svg

A run draws, with replacement, a reference and then traffic through the same ``Watch`` that the
server uses, at the server's default sizes and rate, as the first version that it watches (a canary:
as the second one). Rescored
signals come of every fiftieth request alone (the default share, 2 %), of every fifth of a canary's
(20 %). It prints a table in Markdown; ``--plot`` draws each run's requests until the first alarm.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plots import Found, strips

from manyhats.config import Settings
from manyhats.drift.build import options_of
from manyhats.drift.detectors.spending import share
from manyhats.drift.signals import SIGNALS
from manyhats.drift.watch import HIDDEN, Watch
from manyhats.types import AdapterRef, Digest

Values = dict[str, Any]
Pools = dict[str, list[Values]]
Draw = Callable[[int, random.Random], Values]
"""Request ``number`` (1, 2, ...) of a run."""

HEALTHY, ELSEWHERE, DECAYED = "healthy", "other-domain", "noise-2"
SETTINGS = Settings()
EVERY = round(1 / SETTINGS.drift_share)
EVERY_CANARY = round(1 / SETTINGS.drift_canary_share)
DECAY = 3000


class Run:
    """One version's life in a run. A canary is compared with ``stable``'s references."""

    def __init__(self, seed: int, every: int, stable: Watch | None = None) -> None:
        options = options_of(SETTINGS)
        ref = AdapterRef("pirate", 1, Digest("0" * 64))
        order = 1 if stable is None else 2
        self.watch = Watch(ref, options.alpha * share(order), options.sizes)
        self._stable = stable
        self._every = every
        self._rng = random.Random(seed)
        self._number = 0

    def feed(self, draw: Draw) -> list[str]:
        """One request; the signals of its alarms."""
        self._number += 1
        self.watch.seen += 1
        values = dict(draw(self._number, self._rng))
        hidden = values.pop("hidden")
        if self._number % self._every == 0:
            distance = self.watch.references.hidden.add_projected(hidden)
            if distance is not None:
                values[HIDDEN] = distance
        else:
            values = {k: v for k, v in values.items() if not SIGNALS[k].sampled}
        if self._stable is not None:
            self.watch.compare_with(self._stable.references)
        found = self.watch.add(values, float(self._number), f"r{self._number}")
        return [alarm.finding.signal for alarm in found]

    def until(self, draw: Draw, most: int) -> tuple[int | None, str]:
        """(requests until the first alarm, its signal); (None, "") within ``most``."""
        for number in range(1, most + 1):
            if found := self.feed(lambda _, rng, number=number: draw(number, rng)):
                return number, found[0]
        return None, ""


def referenced(pool: list[Values], seed: int) -> tuple[Run, str]:
    """(a version once all of its references are frozen, the signal of an alarm until then)."""
    run, early = Run(seed, EVERY), ""
    wanted = {*pool[0], HIDDEN} - {"hidden"}
    while not wanted <= run.watch.tracks.keys():
        found = run.feed(lambda _, rng: rng.choice(pool))
        early = early or (found[0] if found else "")
    return run, early


@dataclass(frozen=True, slots=True)
class Scenario:
    """``canary``: what comes is a new version's, compared with the healthy one's references."""

    name: str
    draw: Draw
    canary: bool = False


def latencies(values: Values) -> Values:
    """The times alone. Faulty requests take healthy ones': the machine was not equally quiet while
    each condition was recorded.
    """
    return {name: value for name, value in values.items() if name.endswith("_seconds")}


def scenarios(pools: Pools) -> Iterator[Scenario]:
    """Unchanged traffic first, then every fault."""
    healthy = pools[HEALTHY]

    def slower(factor: float) -> Draw:
        def draw(_: int, rng: random.Random) -> Values:
            values = rng.choice(healthy)
            return {**values, **{k: factor * v for k, v in latencies(values).items()}}

        return draw

    def mixed(part: Callable[[int], float], other: str) -> Draw:
        def draw(number: int, rng: random.Random) -> Values:
            if rng.random() >= part(number):
                return rng.choice(healthy)
            return {**rng.choice(pools[other]), **latencies(rng.choice(healthy))}

        return draw

    yield Scenario("unchanged", mixed(lambda _: 0, HEALTHY))
    yield Scenario("unchanged, as a canary", mixed(lambda _: 0, HEALTHY), canary=True)
    for name in pools:
        if name in (HEALTHY, ELSEWHERE):
            continue
        yield Scenario(name, mixed(lambda _: 1, name))
        yield Scenario(f"{name}, as a canary", mixed(lambda _: 1, name), canary=True)
    for part in (0.25, 0.5, 1.0) if ELSEWHERE in pools else ():
        yield Scenario(f"other domain, {part:.0%}", mixed(lambda _, part=part: part, ELSEWHERE))
    if DECAYED in pools:
        slow = mixed(lambda number: min(1.0, number / DECAY), DECAYED)
        yield Scenario(f"slow decay to {DECAYED} over {DECAY:,} requests", slow)
    for factor in (1.25, 1.5, 3.0):
        yield Scenario(f"latency x{factor:g}", slower(factor))


def found_in(scenario: Scenario, runs: list[Run], most: int) -> list[tuple[int | None, str]]:
    """Each run's first alarm."""
    found = []
    for seed, stable in enumerate(runs):
        if scenario.canary:
            run = Run(10_000 + seed, EVERY_CANARY, stable.watch)
        else:
            run = Run(10_000 + seed, EVERY)
            run.watch.use(stable.watch.references)
            run.watch.seen = SETTINGS.drift_warm_up
        found.append(run.until(scenario.draw, most))
    return found


def row(name: str, found: list[tuple[int | None, str]]) -> str:
    """A line of the table."""
    seen = [number for number, _ in found if number is not None]
    signals = [signal for number, signal in found if number is not None]
    middle = f"{statistics.median(seen):,.0f}" if seen else ""
    worst = f"{max(seen):,}" if seen else ""
    first = ", ".join(f"`{s}`" for s in sorted(set(signals), key=signals.count, reverse=True)[:3])
    return f"| {name} | {len(seen)} of {len(found)} | {middle} | {worst} | {first} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("values", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--most", type=int, default=5000)
    parser.add_argument("--only", default="", help="scenarios whose name begins so")
    parser.add_argument("--plot", type=Path, help="an SVG of all runs")
    given = parser.parse_args()
    pools: Pools = json.loads(given.values.read_text())
    begun = [referenced(pools[HEALTHY], seed) for seed in range(given.runs)]
    early = [signal for _, signal in begun if signal]
    print(f"{len(early)} of {given.runs} runs raised an alarm before all references were frozen")
    print("| traffic | detected | median requests | most | first by |\n|---|---|---|---|---|")
    drawn: list[Found] = []
    for scenario in scenarios(pools):
        if not scenario.name.startswith(given.only):
            continue
        found = found_in(scenario, [run for run, _ in begun], given.most)
        print(row(scenario.name, found), flush=True)
        drawn.append((scenario.name, [number for number, _ in found]))
    if given.plot:
        title = f"Requests until the first alarm, {given.runs} runs each"
        given.plot.write_text(strips(title, drawn, given.most), "utf-8")


if __name__ == "__main__":
    main()
