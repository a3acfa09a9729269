"""Open-loop load: every request is sent at its own time, whether or not earlier ones are answered.

A closed loop (``bench_load.run_cell``) sends the next request when one has ended, so a server that
stalls is asked less, and the stall hardly shows in its latencies (coordinated omission). Here
waiting piles up as it would with independent users.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench_http import Connection
from bench_load import Cell, Load, body_of, connect, prompt_rng, run_request
from bench_stats import RequestResult, Summary, percentile, summarize
from tqdm import tqdm
from workload import TimedRequest, named


@dataclass(frozen=True, slots=True)
class Played:
    """How a list of requests went.

    ``summary.concurrency`` is the most requests that were in flight at once. ``offered_request_s``:
    what was asked for. ``late_p99_ms``: how late the client itself sent; where that is not small
    beside the latencies, the client is the bottleneck. ``by_model``: (requests, errors, ttft p99 in
    ms) for each model that was asked for.
    """

    summary: Summary
    offered_request_s: float
    late_p99_ms: float
    by_model: dict[str, tuple[int, int, float]]
    results: Sequence[RequestResult] = ()

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            **self.summary.as_dict(),
            "offered_request_s": self.offered_request_s,
            "late_p99_ms": self.late_p99_ms,
            "by_model": self.by_model,
        }


class _Player:
    """Sends the requests and remembers what came of them."""

    def __init__(self, load: Load, label: str) -> None:
        self._load = load
        self._label = label
        self._idle: list[Connection] = []
        self._in_flight = 0
        self.most_in_flight = 0
        self.late: list[float] = []
        self.results: list[RequestResult] = []
        self.short = 0

    async def send(self, index: int, request: TimedRequest, model: str, started: float) -> None:
        """Sends one request at its time, on a connection that is free or a new one."""
        await asyncio.sleep(started + request.at_s - time.perf_counter())
        load = replace(
            self._load, input_tokens=request.input_tokens, output_tokens=request.output_tokens
        )
        # The cell only seeds the prompt, which must differ from that of every other request.
        body = body_of(load, model, prompt_rng(load, Cell(0, 0, [model], 0, self._label), index))
        connection = self._idle.pop() if self._idle else connect(load.base_url, load.api_key)
        self.late.append(time.perf_counter() - started - request.at_s)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        result = await run_request(connection, load, body)
        self._in_flight -= 1
        self._idle.append(connection)
        self.results.append(result)
        self.short += result.error is None and result.output_tokens < request.output_tokens

    async def close(self) -> None:
        """Closes the connections."""
        for connection in self._idle:
            await connection.close()


async def play(
    load: Load, requests: Sequence[TimedRequest], names: Sequence[str], *, label: str = "arrivals"
) -> Played:
    """Plays the requests; ``names`` are the adapters, the first for adapter 0.

    Raises ValueError where there are no requests, or fewer names than adapters.
    """
    if not requests:
        raise ValueError("the workload has no requests: raise its rate or its duration")
    models = named(requests, load.model, names)
    player = _Player(load, label)
    with tqdm(total=len(requests), desc=label, unit="req", disable=not load.progress) as bar:
        started, cpu = time.perf_counter(), time.process_time()

        async def one(index: int, request: TimedRequest, model: str) -> None:
            await player.send(index, request, model, started)
            bar.update()

        async with asyncio.TaskGroup() as group:
            for index, (request, model) in enumerate(zip(requests, models, strict=True)):
                group.create_task(one(index, request, model))
        duration, cpu = time.perf_counter() - started, time.process_time() - cpu
    await player.close()
    summary = summarize(
        player.results,
        concurrency=player.most_in_flight,
        adapters=len({r.adapter for r in requests if r.adapter is not None}),
        wanted_tokens=0,
        duration_s=duration,
        client_cpu_s=cpu,
    )
    last = max(requests[-1].at_s, 1e-9)
    return Played(
        replace(summary, short=player.short),
        offered_request_s=len(requests) / last,
        late_p99_ms=1000 * percentile(player.late, 99),
        by_model=_by_model(player.results),
        results=player.results,
    )


def _by_model(results: Sequence[RequestResult]) -> dict[str, tuple[int, int, float]]:
    grouped: dict[str, list[RequestResult]] = {}
    for result in results:
        grouped.setdefault(result.model, []).append(result)
    return {
        model: (
            len(some),
            sum(r.error is not None for r in some),
            1000 * percentile([r.events[0] for r in some if r.error is None and r.events], 99),
        )
        for model, some in sorted(grouped.items())
    }
