"""The comparison's plots, as SVG files. Needs matplotlib (``pip install manyhats[plots]``)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compare.cells import ALL_R16, BASE, ZIPF
from compare.measured import PERCENTS, Measured
from compare.report import Key, Row, rows_of
from compare.target import MATRIX, SLOTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, list[tuple[float, float, float, float]]]
"""Lines by target: (x, median, least, most) over the rounds."""


def lines(rows: Mapping[Key, Row], scenario: str, x: int, wanted: set[tuple[str, int]]) -> Points:
    """Output tokens/s of the cells of a scenario whose (kind, concurrency) is wanted, over the
    key's element ``x`` (3: concurrency, 4: adapters). A target needs two points for a line.
    """
    found: Points = {}
    for key, row in rows.items():
        if key[1] != scenario or (key[2], key[3]) not in wanted:
            continue
        rates = [row.value("output_tok_s", n) for n in row.rounds]
        point = (float(key[x]), statistics.median(rates), min(rates), max(rates))
        found.setdefault(key[0], []).append(point)
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def by_concurrency(rows: Mapping[Key, Row]) -> tuple[Points, Points]:
    """The bare base, and as many adapters as requests."""
    counts = {key[3] for key in rows if key[1] == MATRIX}
    base = lines(rows, MATRIX, 3, {(BASE, c) for c in counts})
    square = {key: row for key, row in rows.items() if key[3] == key[4]}
    return base, lines(square, MATRIX, 3, {(ALL_R16, c) for c in counts})


def cdf(measured: Iterable[Measured], field: str, concurrency: int) -> dict[str, list[float]]:
    """The medians over the rounds of each percentile, by what was asked of whom: the bare base, and
    as many adapters as requests.
    """
    curves: dict[str, list[Sequence[float]]] = {}
    for one in measured:
        values: Sequence[float] = getattr(one, field)
        shown = one.adapters in (0, concurrency) and one.kind in (BASE, ALL_R16)
        if shown and one.scenario == MATRIX and one.concurrency == concurrency and values:
            worn = f"{one.adapters} adapters" if one.adapters else "base"
            curves.setdefault(f"{one.target}, {worn}", []).append(values)
    return {name: [statistics.median(each) for each in zip(*some, strict=True)]
            for name, some in curves.items()}  # fmt: skip


def draw(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Writes every plot that there are measurements for. Raises ImportError without matplotlib."""
    rows = rows_of(measured)
    top = max((key[3] for key in rows if key[1] == MATRIX), default=0)
    base, worn = by_concurrency(rows)
    in_flight = {key[3] for key in rows if key[1] == SLOTS}
    adapters = lines(rows, MATRIX, 4, {(BASE, top), (ALL_R16, top)})
    slots = lines(rows, SLOTS, 4, {(ZIPF, c) for c in in_flight})
    rate = "output tokens/s"

    def at(name: str) -> Path:
        return folder / f"compare-{name}.svg"

    made = [
        _lines(at("throughput-base"), base, "requests in flight", rate,
               "The bare base"),
        _lines(at("throughput-adapters"), worn, "requests in flight", rate,
               "As many adapters as requests (rank 16, all projections)"),
        _lines(at("throughput-number-of-adapters"), adapters, "adapters", rate,
               f"{top} requests in flight"),
        _lines(at("throughput-slots"), slots, "adapters (Zipf 1.1) over 32 slots", rate,
               f"{', '.join(map(str, sorted(in_flight)))} requests in flight"),
        _cdfs(at("ttft-cdf"), cdf(measured, "ttft_ms", top), "time to first token, ms",
              f"{top} requests in flight"),
        _cdfs(at("inter-token-cdf"), cdf(measured, "itl_ms", top),
              "time between tokens, ms", f"{top} requests in flight"),
    ]  # fmt: skip
    return [path for path in made if path is not None]


def _lines(path: Path, points: Points, x: str, y: str, title: str) -> Path | None:
    if not points:
        return None

    def fill(axes: Axes) -> None:
        for name, some in points.items():
            xs, middle, low, high = zip(*some, strict=True)
            spread = ([m - a for m, a in zip(middle, low, strict=True)],
                      [b - m for m, b in zip(middle, high, strict=True)])  # fmt: skip
            axes.errorbar(xs, middle, yerr=spread, marker="o", capsize=3, label=name,
                          linewidth=2.5 if name.startswith("manyhats") else 1.2)  # fmt: skip
        axes.set_xscale("symlog", base=2)
        ticks = sorted({point[0] for some in points.values() for point in some})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(bottom=0)

    return _figure(path, title, x, y, fill)


def _cdfs(path: Path, curves: Mapping[str, Sequence[float]], x: str, title: str) -> Path | None:
    if not curves:
        return None

    def fill(axes: Axes) -> None:
        for name, values in curves.items():
            axes.plot(values, PERCENTS, label=name,
                      linewidth=2.5 if name.startswith("manyhats") else 1.2)  # fmt: skip
        axes.set_xscale("log")

    return _figure(path, title, x, "percent", fill)


def _figure(path: Path, title: str, x: str, y: str, fill: Callable[[Axes], None]) -> Path:
    import matplotlib as mpl

    mpl.use("svg")
    # Text stays text, and a plot of the same figures is the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "manyhats"})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    fill(axes)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path
