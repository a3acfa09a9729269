"""Which requests a target gets: the matrix of serve_bench, Zipf over more adapters than slots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench_load import Cell, default_requests
from compare.target import Target
from workload import AdapterChoice, Workload

BASE, ALL_R16, QV_R8 = "none", "all-r16", "qv-r8"
ZIPF = "zipf-1.1"


@dataclass(frozen=True, slots=True)
class Options:
    """What of it all is run. ``every``: the matrix's cells between the bars' as well.

    ``rate``, ``seconds``: of S-LoRA's workload. ``sizes``: adapters in the Zipf cells.
    """

    concurrencies: tuple[int, ...] = (1, 8, 32)
    counts: tuple[int, ...] = (1, 8, 32)
    every: bool = False
    quick: bool = False
    rounds: int = 3
    seed: int = 0
    input_tokens: int = 128
    output_tokens: int = 128
    rate: float = 1.0
    seconds: float = 60.0
    sizes: tuple[int, ...] = (32, 64, 128)
    in_flight: int = 16
    pairs: int = 16
    registered: tuple[int, int] = (10, 2000)
    start_timeout_s: float = 600.0
    vocab_size: int = 32000


def matrix(
    target: Target, options: Options, base: str, all_r16: Sequence[str], qv_r8: Sequence[str]
) -> list[tuple[str, Cell]]:
    """(kind, cell) pairs that the target can be asked for.

    The bare base at every concurrency; as many adapters as requests; one adapter and the other
    counts where ``every``; rank 8 on q and v once, at the largest concurrency.
    """
    wanted: list[tuple[str, int, Sequence[str]]] = []
    top = max(options.concurrencies)
    for concurrency in options.concurrencies:
        if target.base:
            wanted.append((BASE, concurrency, []))
        for count in options.counts:
            barred = count == concurrency or (target.qv and count == 1 and concurrency == top)
            if count <= min(target.wears, concurrency) and (options.every or barred):
                wanted.append((ALL_R16, concurrency, all_r16[:count]))
    if target.qv:
        wanted.append((QV_R8, top, qv_r8[:top]))
    return [
        (kind, Cell(c, default_requests(c, quick=options.quick), names or [base], len(names), kind))
        for kind, c, names in wanted
    ]


def zipf(options: Options, names: Sequence[str], number: int) -> Cell:
    """A closed loop over all ``names``, drawn with P(i) ~ i^-1.1; another draw every round."""
    choice = AdapterChoice(len(names), 1.1)
    rng = random.Random(f"{options.seed}/{len(names)}/{number}")
    requests = (3 if options.quick else 6) * options.in_flight
    models = [names[choice.draw(rng)] for _ in range(requests)]
    return Cell(options.in_flight, requests, models, len(names), f"{ZIPF} round {number}")


def slora(options: Options, adapters: int, number: int) -> Workload:
    """S-LoRA's synthetic workload at this machine's scale."""
    return Workload(
        adapters=adapters,
        rate=options.rate,
        duration_s=options.seconds / (2 if options.quick else 1),
        input_tokens=(8, 256),
        output_tokens=(8, 128),
        seed=options.seed + number,
    )
