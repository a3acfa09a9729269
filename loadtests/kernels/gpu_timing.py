"""Timing on a CUDA device, shared by the bench_gpu*.py and tune.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from manyhats_kernels import AdapterBatch, SiteRows
from manyhats_kernels.triton.lora import Site

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: quantiles over the rounds."""

    p10: float
    median: float
    p90: float


def measure(calls: Sequence[Call], *, rounds: int) -> Times:
    """Time one call, over ``rounds`` replays of a CUDA graph that makes each of ``calls`` once.

    In a graph the host is out of the way, as in a captured decode step. ``calls`` should work on
    more memory together than the device's cache holds.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    times.sort()
    return Times(*(times[int(q * (len(times) - 1))] for q in (0.1, 0.5, 0.9)))


def bandwidth(megabytes: int, rounds: int) -> float:
    """Bytes a second that the device reads when a kernel of torch's sums one large tensor."""
    values = torch.ones(megabytes * 250_000, device="cuda")
    return values.numel() * 4 / measure([values.sum], rounds=rounds).median * 1e6


@dataclass(frozen=True)
class Shape:
    """A step's adapters at one site: tokens over adapters of one rank, in -> out."""

    tokens: int
    adapters: int
    rank: int
    n_in: int
    n_out: int

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens over {self.adapters}, rank {self.rank}, "
            f"{self.n_in} -> {self.n_out}"
        )

    def bytes_moved(self, width: int, sites: int = 1) -> int:
        """What any way must move: the worn rows, x once, and each site's y in and out."""
        weights = min(self.tokens, self.adapters) * self.rank * (self.n_in + self.n_out)
        return width * (sites * (weights + 2 * self.tokens * self.n_out) + self.tokens * self.n_in)

    def plan(self) -> AdapterBatch:
        """Token t wears adapter t modulo their number."""
        slots = [token % self.adapters for token in range(self.tokens)]
        return AdapterBatch.build(slots, self.adapters, "cuda")

    def sites(self, copies: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[Site]]:
        """x, and ``copies`` sites with pools of their own."""
        pool = self.adapters * self.rank
        count = torch.full((self.adapters,), self.rank, dtype=torch.int32, device="cuda")
        start = torch.arange(self.adapters, dtype=torch.int32, device="cuda") * self.rank
        options = {"dtype": dtype, "device": "cuda"}
        return torch.randn(self.tokens, self.n_in, **options), [
            Site(
                y=torch.zeros(self.tokens, self.n_out, **options),
                a=torch.randn(pool, self.n_in, **options) * self.n_in**-0.5,
                b=torch.randn(pool, self.n_out, **options) * self.rank**-0.5,
                rows=SiteRows(start, count),
            )
            for _ in range(copies)
        ]

    def copies(self, megabytes: int, width: int) -> int:
        """How many sites fill so much memory, within reason."""
        return max(1, min(64, megabytes * 1_000_000 // self.bytes_moved(width)))
