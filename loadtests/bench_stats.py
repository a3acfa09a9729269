"""What one request gave, and what a run of them amounts to.

Times are in seconds unless a name says ``_ms``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(slots=True)
class RequestResult:
    """One request. ``events``: when each event with a token came, counted from the request's start.

    ``error`` is None for an answer that came to its end. ``counted`` tells whether
    ``output_tokens`` is the server's own count (``usage``) or the number of events.
    """

    model: str
    error: str | None = None
    latency: float = 0.0
    events: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: str = "events"


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-th percentile (0..100) with linear interpolation, as numpy's default.

    Nan of nothing.
    """
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100.0
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """One cell of the matrix: so many requests at one concurrency over so many adapters.

    ``itl_*``: gaps between events of one stream; ``tpot_*``: per request, (last - first event) /
    (tokens - 1), which does not depend on how a server groups tokens into events. ``client_cpu``:
    CPU seconds that the client itself took per second of the run. ``short``: answers with fewer
    tokens than asked for.
    """

    concurrency: int
    adapters: int
    requests: int
    errors: int
    error_kinds: dict[str, int]
    short: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    counted: str
    output_tok_s: float
    request_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    latency_p50_ms: float
    latency_p99_ms: float
    client_cpu: float

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def summarize(
    results: Sequence[RequestResult],
    *,
    concurrency: int,
    adapters: int,
    wanted_tokens: int,
    duration_s: float,
    client_cpu_s: float,
) -> Summary:
    """Sums one cell up. Failed requests are counted, and add nothing to the other figures."""
    good = [r for r in results if r.error is None]
    timed = [r for r in good if r.events]
    kinds = Counter(r.error for r in results if r.error is not None)
    tokens = sum(r.output_tokens for r in good)

    def ms(values: Iterable[float], q: float) -> float:
        return 1000.0 * percentile(list(values), q)

    ttft = [r.events[0] for r in timed]
    gaps = [b - a for r in timed for a, b in pairwise(r.events)]
    tpot = [
        (r.events[-1] - r.events[0]) / (r.output_tokens - 1) for r in timed if r.output_tokens > 1
    ]
    latency = [r.latency for r in good]
    return Summary(
        concurrency=concurrency,
        adapters=adapters,
        requests=len(results),
        errors=len(results) - len(good),
        error_kinds=dict(kinds),
        short=sum(r.output_tokens < wanted_tokens for r in good),
        duration_s=duration_s,
        prompt_tokens=sum(r.prompt_tokens for r in good),
        output_tokens=tokens,
        counted="usage" if all(r.counted == "usage" for r in good) else "events",
        output_tok_s=tokens / duration_s,
        request_s=len(good) / duration_s,
        ttft_p50_ms=ms(ttft, 50),
        ttft_p99_ms=ms(ttft, 99),
        itl_p50_ms=ms(gaps, 50),
        itl_p99_ms=ms(gaps, 99),
        tpot_p50_ms=ms(tpot, 50),
        tpot_p99_ms=ms(tpot, 99),
        latency_p50_ms=ms(latency, 50),
        latency_p99_ms=ms(latency, 99),
        client_cpu=client_cpu_s / duration_s,
    )


TABLE = (
    ("concurrency", "conc", "d"),
    ("adapters", "adapters", "d"),
    ("requests", "reqs", "d"),
    ("errors", "errors", "d"),
    ("output_tok_s", "tok/s", ".1f"),
    ("ttft_p50_ms", "ttft p50", ".0f"),
    ("ttft_p99_ms", "ttft p99", ".0f"),
    ("itl_p50_ms", "itl p50", ".1f"),
    ("itl_p99_ms", "itl p99", ".1f"),
    ("tpot_p50_ms", "tpot p50", ".1f"),
    ("client_cpu", "client cpu", ".2f"),
)


def table(summaries: Iterable[Summary]) -> str:
    """The cells as text columns; times in ms."""
    rows = [[title for _, title, _ in TABLE]]
    rows += [[format(getattr(s, name), spec) for name, _, spec in TABLE] for s in summaries]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TABLE))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows
    )
