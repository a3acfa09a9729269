"""When requests come, for which adapter, and how long they are: S-LoRA's synthetic workload.

Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters" (arXiv:2311.03285), section
7.1: adapter i of n has the mean rate lambda_i, a power law of exponent alpha (lambda_i ~ i^-alpha,
all of them R together); arrivals are a Gamma process of the given coefficient of variation; input
and output lengths are uniform. The defaults are those of its experiments on one A10G.

Two readings are possible, and ``Workload.pooled`` chooses. The paper gives each adapter a Gamma
process of its own; the authors' script draws one process of rate R and then the adapter of each
arrival. Only the second has the coefficient of variation that was asked for as a whole (many
independent processes add up to something near Poisson), so it is the default. The script draws
adapters by ``numpy.random.power``, which for alpha = 1 is uniform; here the paper's text holds.

The standard library alone, so that Locust's environment can import it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request: ``at_s`` seconds after the start. ``adapter`` counts from 0, the most popular
    one in a generated workload; None is the base model.
    """

    at_s: float
    adapter: int | None
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What is generated. ``rate``: requests a second over all adapters. ``cv``: coefficient of
    variation of the time between arrivals, 1 is Poisson. ``adapters`` 0: only the base model.
    Lengths are uniform over both bounds, which are included. Raises ValueError for a field out of
    its bound.
    """

    adapters: int = 200
    alpha: float = 1.0
    rate: float = 2.0
    cv: float = 1.0
    duration_s: float = 300.0
    input_tokens: tuple[int, int] = (8, 512)
    output_tokens: tuple[int, int] = (8, 512)
    pooled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.adapters < 0:
            raise ValueError(f"adapters must be at least 0, got {self.adapters}")
        if self.alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")
        for name in ("rate", "cv", "duration_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("input_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be 1 <= low <= high, got {low}..{high}")


def popularity(adapters: int, alpha: float) -> list[float]:
    """Each adapter's share of the requests, the most popular first: i^-alpha, summing to 1."""
    weights = [rank**-alpha for rank in range(1, adapters + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


class AdapterChoice:
    """Draws adapters by their popularity. ``adapters`` must be at least 1."""

    def __init__(self, adapters: int, alpha: float) -> None:
        self._all = range(adapters)
        self._cumulated = list(accumulate(popularity(adapters, alpha)))

    def draw(self, rng: random.Random) -> int:
        """An adapter, counted from 0."""
        return rng.choices(self._all, cum_weights=self._cumulated)[0]


def arrivals(rate: float, cv: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Times of a Gamma process before ``duration_s``: the gaps have the mean 1 / rate and the
    coefficient of variation ``cv`` (shape 1 / cv^2, scale cv^2 / rate).
    """
    shape, scale = 1.0 / cv**2, cv**2 / rate
    at = rng.gammavariate(shape, scale)
    while at < duration_s:
        yield at
        at += rng.gammavariate(shape, scale)


def generate(workload: Workload) -> list[TimedRequest]:
    """The workload's requests by time; the same for the same seed."""
    rng = random.Random(workload.seed)
    timed = _pooled(workload, rng) if workload.pooled else _own_processes(workload, rng)
    return [
        TimedRequest(
            at, adapter, rng.randint(*workload.input_tokens), rng.randint(*workload.output_tokens)
        )
        for at, adapter in timed
    ]


def _pooled(workload: Workload, rng: random.Random) -> list[tuple[float, int | None]]:
    times = arrivals(workload.rate, workload.cv, workload.duration_s, rng)
    if not workload.adapters:
        return [(at, None) for at in times]
    choice = AdapterChoice(workload.adapters, workload.alpha)
    return [(at, choice.draw(rng)) for at in times]


def _own_processes(workload: Workload, rng: random.Random) -> list[tuple[float, int | None]]:
    if not workload.adapters:
        return _pooled(workload, rng)
    made: list[tuple[float, int | None]] = []
    for adapter, share in enumerate(popularity(workload.adapters, workload.alpha)):
        own = arrivals(workload.rate * share, workload.cv, workload.duration_s, rng)
        made += [(at, adapter) for at in own]
    return sorted(made, key=lambda pair: pair[0])


def named(requests: Sequence[TimedRequest], base: str, names: Sequence[str]) -> list[str]:
    """The model that each request asks for.

    Raises ValueError where there are fewer names than adapters.
    """
    needed = 1 + max((r.adapter for r in requests if r.adapter is not None), default=-1)
    if needed > len(names):
        raise ValueError(f"the workload has {needed} adapters; the server lists {len(names)}")
    return [base if r.adapter is None else names[r.adapter] for r in requests]
