"""The bars that a comparison is held to: ours against the best setting of each peer, in one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compare.cells import ALL_R16, BASE, QV_R8, ZIPF
from compare.measured import START
from compare.ours import COLD_START, MAIN, MANY_SLOTS, NO_LAYERS
from compare.registered import KIND as REGISTERED_KIND
from compare.report import Key, Row, ratio
from compare.target import COLD, MATRIX, PREFIX, REGISTERED, SLOTS

RATE, TTFT, ITL_P99 = "output_tok_s", "ttft_p50_ms", "itl_p99_ms"
VLLM_LORA = ("vllm-lora-8", "vllm-lora-32", "vllm-lora-32-r16")
LLAMA_LORA = ("llama.cpp-q4_0-lora", "llama.cpp-bf16-lora", "llama.cpp-q4_1-lora")


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure of ours by one of ``below`` (the best of them counts), and what it must reach.

    ``least``: the ratio must be at least ``bound``; otherwise at most. ``aim``: what is aimed at
    beyond the bound. Without ``below`` the figure itself is held to the bound.
    """

    name: str
    above: Key
    below: tuple[Key, ...]
    figure: str
    bound: float
    least: bool = True
    aim: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and what was measured: the median over the rounds, their range, against which side.

    ``value`` is nan where a side was not measured.
    """

    bar: Bar
    value: float
    low: float
    high: float
    against: str

    @property
    def judged(self) -> bool:
        """Whether both sides were measured in a round."""
        return not math.isnan(self.value)

    @property
    def met(self) -> bool:
        """Whether the bar is reached."""
        if self.bar.least:
            return self.value >= self.bar.bound
        return self.value <= self.bar.bound

    def __str__(self) -> str:
        word = "at least" if self.bar.least else "at most"
        aim = f", aim {self.bar.aim:g}" if self.bar.aim is not None else ""
        bound = f"({word} {self.bar.bound:g}{aim})"
        if not self.judged:
            return f"?    not measured {bound} {self.bar.name}"
        said = "ok  " if self.met else "MISS"
        return (
            f"{said} {self.value:8.3f} [{self.low:.3f}, {self.high:.3f}] {bound} "
            f"{self.bar.name} {self.against}".rstrip()
        )


def _matrix(target: str, concurrency: int, adapters: int, kind: str = ALL_R16) -> Key:
    return (target, MATRIX, kind if adapters else BASE, concurrency, adapters)


def _worn(targets: Iterable[str], count: int) -> tuple[Key, ...]:
    return tuple(_matrix(name, count, count) for name in targets)


def _rates() -> list[Bar]:
    """Throughput with as many adapters as requests, and with one."""
    found = []
    against_bare = {1: (1.5, None), 8: (1.0, 1.3), 32: (1.0, 1.2)}
    for count, (bound, aim) in against_bare.items():
        ours, bare = _matrix(MAIN, count, count), (_matrix("vllm", count, 0),)
        name = f"{count} over {count} adapters: rate / vLLM's bare base"
        found.append(Bar(name, ours, bare, RATE, bound, aim=aim))
    for count, bound in ((8, 4.0), (32, 4.5)):
        name = f"{count} over {count} adapters: rate / vLLM with LoRA on"
        ours = _matrix(MAIN, count, count)
        found.append(Bar(name, ours, _worn(VLLM_LORA, count), RATE, bound))
    for count, bound in ((1, 1.0), (8, 2.0), (32, 1.0)):
        name = f"{count} over {count} adapters: rate / llama.cpp with as many"
        ours = _matrix(MAIN, count, count)
        found.append(Bar(name, ours, _worn(LLAMA_LORA, count), RATE, bound))
    q4_1 = (_matrix("llama.cpp-q4_1", 1, 0),)
    found.append(Bar("aim: 1 with an adapter: rate / llama.cpp's Q4_1 base", _matrix(MAIN, 1, 1),
                     q4_1, RATE, 0.8))  # fmt: skip
    peft = _worn(["peft"], 32)
    found.append(Bar("32 over 32 adapters: rate / PEFT's mixed batch", _matrix(MAIN, 32, 32),
                     peft, RATE, 1.0))  # fmt: skip
    return found


def _latencies() -> list[Bar]:
    bars = [
        Bar(
            f"{count} over {count} adapters: time to first token p50 / vLLM's bare base",
            _matrix(MAIN, count, count), (_matrix("vllm", count, 0),), TTFT, 1.0, least=False,
        )
        for count in (1, 8, 32)
    ]  # fmt: skip
    name = "32 over 32 adapters: inter-token p99 / vLLM's bare base"
    ours, bare = _matrix(MAIN, 32, 32), (_matrix("vllm", 32, 0),)
    return [*bars, Bar(name, ours, bare, ITL_P99, 0.5, least=False)]


def _own() -> list[Bar]:
    """Adapters against our own bare base."""
    base = (_matrix(MAIN, 32, 0),)
    rows = (
        ("one adapter of rank 16 on all / own base, 32 in flight", ALL_R16, 1, 0.9),
        ("32 of rank 8 on q, v / own base, 32 in flight", QV_R8, 32, 0.9),
        ("32 of rank 16 on all / own base, 32 in flight", ALL_R16, 32, 0.65),
    )
    bars = [Bar(name, _matrix(MAIN, 32, n, kind), base, RATE, b) for name, kind, n, b in rows]
    return bars + [
        Bar(
            f"base / engine without adapter layers, {count} in flight",
            _matrix(MAIN, count, 0), (_matrix(NO_LAYERS, count, 0),), RATE, 0.98,
        )
        for count in (1, 8, 32)
    ]  # fmt: skip


def _one(target: str, scenario: str, kind: str, adapters: int, concurrency: int = 1) -> Key:
    return (target, scenario, kind, concurrency, adapters)


def bars(most: int, registered: tuple[int, int], in_flight: int, wears: int) -> list[Bar]:
    """All of them. ``most``: adapters in the largest Zipf cell; ``in_flight``: requests there.

    ``registered``: the two numbers of registered adapters; ``wears``: adapters of the main target.
    """
    few, lots = (_one(MAIN, REGISTERED, REGISTERED_KIND, count, 0) for count in registered)
    start = _one(MAIN, START, BASE, wears, 0)
    resident = _one(MANY_SLOTS, SLOTS, ZIPF, most, in_flight)
    short = _one(MAIN, SLOTS, ZIPF, most, in_flight)
    cold, warm = (_one(COLD_START, COLD, kind, 1) for kind in ("cold", "warm"))
    first, second = (_one(MAIN, PREFIX, kind, 1) for kind in ("first", "second"))
    vllm = (_one("vllm", START, BASE, 0, 0),)
    four = f"{most} adapters over 32 slots, Zipf: "
    return [
        *_rates(),
        *_latencies(),
        *_own(),
        Bar("start-up with everything cached, s", start, (), "start_s", 10.0, least=False),
        Bar("resident memory / vLLM's", start, vllm, "memory_mib", 0.25, least=False),
        Bar(f"{four}rate / all resident", short, (resident,), RATE, 0.85),
        Bar(f"{four}the popular one's inter-token p99 / all resident", short, (resident,),
            "popular_itl_p99_ms", 2.0, least=False),
        Bar(f"start-up with {registered[1]} registered / {registered[0]}", lots, (few,),
            "start_s", 1.2, least=False),
        Bar(f"memory with {registered[1]} registered / {registered[0]}", lots, (few,),
            "memory_mib", 1.1, least=False),
        Bar("time to first token, cold adapter / warm", cold, (warm,), TTFT, 1.25, least=False),
        Bar("time to first token, first / second with a shared prefix", first, (second,), TTFT,
            5.0),
    ]  # fmt: skip


def judge(bar: Bar, rows: Mapping[Key, Row]) -> Verdict:
    """The bar against the best side that was measured: the one that makes it hardest."""
    nothing = Verdict(bar, math.nan, math.nan, math.nan, "")
    if bar.above not in rows:
        return nothing
    above = rows[bar.above]
    if not bar.below:
        values = [v for n in above.rounds if not math.isnan(v := above.value(bar.figure, n))]
        return _verdict(bar, values, "") if values else nothing
    made = [ratio(above, rows[key], bar.figure) for key in bar.below if key in rows]
    verdicts = [_verdict(bar, r.by_round, f"({r.below[0]})") for r in made if r is not None]
    hardest = min if bar.least else max
    return hardest(verdicts, key=lambda v: v.value) if verdicts else nothing


def _verdict(bar: Bar, values: Sequence[float], against: str) -> Verdict:
    return Verdict(bar, statistics.median(values), min(values), max(values), against)
