"""What is asked of one server that is up: each scenario gives the measurements of its cells."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench_arrivals import play
from bench_load import Cell, Load, body_of, collect, connect, prompt_rng, run_request, warm_up
from bench_stats import percentile
from compare.cells import ALL_R16, BASE, ZIPF, Options, matrix, slora, zipf
from compare.measured import Measured, latencies, numbers
from compare.target import COLD, MATRIX, PREFIX, SLORA, SLOTS, Target
from workload import generate

PREFIX_TOKENS, SUFFIX_TOKENS = 512, 16


@dataclass(frozen=True, slots=True)
class Visit:
    """A target in a round. ``load`` has its address and the id of its base."""

    target: Target
    round: int
    load: Load
    options: Options
    all_r16: Sequence[str]
    qv_r8: Sequence[str]

    @property
    def worn(self) -> Sequence[str]:
        """The adapters that the target can be asked for."""
        return self.all_r16[: self.target.wears]

    def measured(
        self, scenario: str, kind: str, concurrency: int, adapters: int,
        values: Mapping[str, float], times: tuple[list[float], list[float]] = ([], []),
    ) -> Measured:  # fmt: skip
        """A measurement of this visit."""
        return Measured(
            self.target.name, scenario, kind, concurrency, adapters, self.round, values, *times
        )


async def _warm(visit: Visit, models: Sequence[str]) -> None:
    """Each model once, then a full batch for the shapes."""
    wanted = list(dict.fromkeys(models))
    await warm_up(visit.load, wanted)
    top = max(visit.options.concurrencies)
    # A server that serves an adapter's requests alone is not asked for the base.
    short = replace(visit.load, output_tokens=min(8, visit.load.output_tokens))
    label = f"warm-up round {visit.round}"
    await collect(short, Cell(top, top, wanted[-top:], len(wanted), label))


async def run_matrix(visit: Visit) -> list[Measured]:
    """serve_bench's closed loop; the same prompts for every target."""
    cells = matrix(visit.target, visit.options, visit.load.model, visit.all_r16, visit.qv_r8)
    await _warm(visit, [model for _, cell in cells for model in cell.models])
    found = []
    for kind, cell in cells:
        # A label a round: the same prompts twice would meet a prefix cache.
        named = replace(cell, label=f"{kind} round {visit.round}")
        got = await collect(visit.load, named)
        values = numbers(got.summary(visit.load, named))
        found.append(
            visit.measured(
                MATRIX, kind, cell.concurrency, cell.adapters, values, latencies(got.results)
            )
        )
    return found


async def run_slora(visit: Visit) -> list[Measured]:
    """S-LoRA's open loop over 32 adapters; a server without adapters gets it for its base: the
    same times, lengths and prompts.
    """
    worn = visit.worn[:32]
    names = worn or [visit.load.model] * 32
    requests = generate(slora(visit.options, len(names), visit.round))
    await _warm(visit, names)
    played = await play(visit.load, requests, names, label=f"slora round {visit.round}")
    values = numbers(played.summary) | {
        "offered_request_s": played.offered_request_s,
        "late_p99_ms": played.late_p99_ms,
    }
    kind = ALL_R16 if worn else BASE
    return [visit.measured(SLORA, kind, 0, len(worn), values, latencies(played.results))]


async def run_slots(visit: Visit) -> list[Measured]:
    """Zipf-popular adapters, a closed loop: all of them, and fewer where slots are short."""
    found = []
    everyone = len(visit.worn)
    sizes = [size for size in visit.options.sizes if size <= everyone]
    await _warm(visit, visit.worn[::-1])  # the popular ones last: where slots are short they stay
    for size in sizes:
        names = visit.worn[:size]
        cell = zipf(visit.options, names, visit.round)
        got = await collect(visit.load, cell)
        popular = [r for r in got.results if r.model == names[0]]
        _, gaps = latencies(popular)
        values = numbers(got.summary(visit.load, cell))
        values |= {"popular_itl_p99_ms": gaps[99]} if gaps else {}
        found.append(
            visit.measured(SLOTS, ZIPF, cell.concurrency, size, values, latencies(got.results))
        )
    return found


async def _ttft_ms(visit: Visit, model: str, prompt: Sequence[int]) -> float:
    """Of one request that is alone. Raises RuntimeError where it failed."""
    connection = connect(visit.load.base_url, None)
    load = replace(visit.load, output_tokens=4)
    body = body_of(load, model, random.Random(0)) | {"prompt": list(prompt)}
    result = await run_request(connection, load, body)
    await connection.close()
    if result.error is not None or not result.events:
        raise RuntimeError(f"{model}: {result.error or 'no token'}")
    return 1000 * result.events[0]


def _prompt(visit: Visit, label: str, tokens: int) -> list[int]:
    rng = prompt_rng(visit.load, Cell(1, 1, [], 0, f"{label} round {visit.round}"), 0)
    return [rng.randrange(1000, visit.load.vocab_size) for _ in range(tokens)]


async def run_cold(visit: Visit) -> list[Measured]:
    """An adapter's first request since the start, beside one of an adapter that is resident."""
    warm, *others = visit.worn
    await _warm(visit, [warm])
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    tokens = visit.options.input_tokens
    for number, name in enumerate(others[-visit.options.pairs :]):
        for kind, model in (("cold", name), ("warm", warm)):
            prompt = _prompt(visit, f"{kind} {number}", tokens)
            times[kind].append(await _ttft_ms(visit, model, prompt))
    return [
        visit.measured(COLD, kind, 1, 1, _times(values)) for kind, values in times.items()
    ]  # fmt: skip


async def run_prefix(visit: Visit) -> list[Measured]:
    """Two requests of one adapter that share a system prompt of 512 tokens, one after the other."""
    model = visit.worn[0] if visit.worn else visit.load.model
    await _warm(visit, [model])
    times: dict[str, list[float]] = {"first": [], "second": []}
    for number in range(max(2, visit.options.pairs // 4)):
        shared = _prompt(visit, f"prefix {number}", PREFIX_TOKENS)
        for kind, values in times.items():
            own = _prompt(visit, f"suffix {number} {kind}", SUFFIX_TOKENS)
            values.append(await _ttft_ms(visit, model, [*shared, *own]))
    count = int(bool(visit.worn))
    return [visit.measured(PREFIX, kind, 1, count, _times(v)) for kind, v in times.items()]


def _times(values: Sequence[float]) -> dict[str, float]:
    return {"ttft_p50_ms": median(values), "ttft_p99_ms": percentile(values, 99)}


RUN: Mapping[str, Callable[[Visit], Awaitable[list[Measured]]]] = {
    MATRIX: run_matrix,
    SLORA: run_slora,
    SLOTS: run_slots,
    PREFIX: run_prefix,
    COLD: run_cold,
}
"""Each scenario of a server that is up, in the order in which they are run."""
