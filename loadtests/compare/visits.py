"""A visit: one target is started, asked for its scenarios, measured and stopped. One at a time."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

import numpy as np
from bench_load import Load, served_models
from compare.cells import ALL_R16, BASE, Options
from compare.environments import UnavailableError
from compare.measured import START, Measured
from compare.scenarios import RUN, Visit
from compare.server import PeerServer, memory_mib
from compare.target import MATRIX, Place, Target
from server_process import LocalPeer, ServerError, free_port, register
from tqdm import tqdm


def pace_gb_s(megabytes: int = 256, times: int = 5) -> float:
    """How fast one large array is read now, GB/s, the best of a few: a shared machine changes its
    speed, and a round in which it did tells so.
    """
    data = np.ones(megabytes * (1 << 20) // 8)
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best / 1e9


async def visit(
    target: Target, place: Place, options: Options, number: int, scenarios: Sequence[str]
) -> list[Measured]:
    """All of a target's measurements in one round; its start comes last.

    Raises UnavailableError, ServerError, or RuntimeError where a warm-up failed.
    """
    tqdm.write(f"round {number}: {target.name}", file=sys.stderr)
    pace = await asyncio.to_thread(pace_gb_s)
    if target.launch is None:
        return await _batches(target, place, options, number, pace)
    port = free_port()
    log = place.work / "logs" / f"{target.name}.log"
    server = PeerServer(target.launch(port), port, log)
    try:
        start_s = await server.wait_ready(target.ready, options.start_timeout_s)
        made = await _prepared(server, target, place, options, number)
        start = {"start_s": start_s, "ready_mib": server.memory_mib(), "pace_gb_s": pace}
        found: list[Measured] = []
        for name, run in RUN.items():
            if name in scenarios and name in target.scenarios:
                found += await run(made)
        start["memory_mib"] = server.memory_mib()
        found.append(made.measured(START, BASE, 0, target.wears, start))
        return found
    finally:
        await asyncio.to_thread(server.stop)


async def _prepared(
    server: PeerServer, target: Target, place: Place, options: Options, number: int
) -> Visit:
    """The adapters registered, and the base's id known.

    What an earlier start has registered is left alone: to register is to load.
    """
    listed = await served_models(server.base_url, None)
    if target.runtime:
        wanted = [*place.all_r16[: target.wears], *(place.qv_r8 if target.qv else ())]
        await register(server.base_url, [a for a in wanted if a.name not in listed])
    load = Load(
        base_url=server.base_url,
        model=listed[0],
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        ignore_eos=True,
        vocab_size=options.vocab_size,
        seed=options.seed,
        fields=target.fields,
    )
    names = ([a.name for a in place.all_r16], [a.name for a in place.qv_r8])
    return Visit(target, number, load, options, *names)


async def _batches(
    target: Target, place: Place, options: Options, number: int, pace: float
) -> list[Measured]:
    """A batch of each size, given at once, by a library's own generation."""
    flags = [
        *target.batch, "--batch", "1", "--seed", str(options.seed + 1000 * number),
        "--input-tokens", str(options.input_tokens),
        "--output-tokens", str(options.output_tokens), "--vocab-size", str(options.vocab_size),
    ]  # fmt: skip
    log = place.work / "logs" / f"{target.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    python = place.python(target.peer)
    try:
        peer = await asyncio.to_thread(LocalPeer, flags, log, python)
    except OSError as error:
        raise UnavailableError(f"{python}: {error.strerror}") from error
    found = []
    try:
        for size in options.concurrencies:
            values = await asyncio.to_thread(peer.batch, size)
            count = min(size, target.wears)
            kind = ALL_R16 if count else BASE
            found.append(Measured(target.name, MATRIX, kind, size, count, number, values))
        start = {"memory_mib": memory_mib(peer.pid), "pace_gb_s": pace}
        return [*found, Measured(target.name, START, BASE, 0, target.wears, number, start)]
    finally:
        await asyncio.to_thread(peer.stop)


FAILURES = (UnavailableError, ServerError, RuntimeError)
"""What a visit of a peer that does not work here raises."""
