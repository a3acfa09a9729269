"""Loads any OpenAI-compatible server with streaming requests and reports throughput and latency.

    python loadtests/serve_bench.py --base-url http://127.0.0.1:8000 --concurrency 1,8,32 --adapters
    0,1,8 --ignore-eos

A cell is one concurrency with one number of adapters; requests take the adapters in turn (0: the
base model). The table goes to stderr, the JSON to stdout. Every prompt is different, so that no
prefix cache can help.

With --arrivals the load is open-loop instead: requests come at their own times, from S-LoRA's
synthetic workload or from a CSV trace (workload.py and traces.py have the fields).

    python loadtests/serve_bench.py --arrivals slora --num-adapters 32 --rate 4 --cv 2
    python loadtests/serve_bench.py --arrivals trace.csv --speed 2 --num-adapters 32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_arrivals import Played, play
from bench_load import Cell, Load, default_requests, run_cell, served_models, warm_up
from bench_stats import Summary, table
from traces import adapted, read_trace, spread
from workload import TimedRequest, Workload, generate


def make_cells(
    wanted: Sequence[str],
    base: str,
    names: Sequence[str],
    concurrencies: Sequence[int],
    requests: Callable[[int], int],
) -> list[Cell]:
    """The matrix of ``--adapters`` (numbers, or names for one cell) and ``--concurrency``.

    Raises ValueError.
    """
    sets: list[list[str]] = []
    if all(w.isdigit() for w in wanted):
        for count in map(int, wanted):
            if count > len(names):
                raise ValueError(f"--adapters {count}: the server lists only {len(names)} adapters")
            sets.append(list(names[:count]))
    else:
        sets.append(list(wanted))
    return [
        Cell(concurrency=c, requests=requests(c), models=chosen or [base], adapters=len(chosen))
        for chosen in sets
        for c in concurrencies
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base-url", default="http://127.0.0.1:8000", help="without /v1")
    p.add_argument("--model", help="the base model's id; default: the first that /v1/models lists")
    p.add_argument(
        "--adapters", default="0", help="numbers (0,1,8,32) or names (a,b,c), comma-separated"
    )
    p.add_argument(
        "--adapter-prefix", default="", help="numbers count only adapters whose name starts so"
    )
    p.add_argument("--concurrency", default="1,8,32", help="comma-separated")
    p.add_argument(
        "--requests", type=int, help="per cell; default: twice the concurrency, at least 4"
    )
    p.add_argument("--input-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=128)
    p.add_argument("--endpoint", choices=["completions", "chat"], default="completions")
    p.add_argument(
        "--prompt-format", choices=["ids", "text"], default="ids", help="completions only"
    )
    p.add_argument("--vocab-size", type=int, default=32000, help="token ids are drawn below it")
    p.add_argument(
        "--ignore-eos", action="store_true", help="ask for exactly --output-tokens tokens"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--api-key")
    p.add_argument("--timeout-s", type=float, default=600.0, help="of one request")
    p.add_argument("--quick", action="store_true", help="half the requests")
    p.add_argument("--no-warm-up", action="store_true")
    p.add_argument("--no-progress", action="store_true")
    _arrival_flags(p)
    p.add_argument("--json", type=Path, help="write the JSON here instead of to stdout")
    return p.parse_args(argv)


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def _arrival_flags(p: argparse.ArgumentParser) -> None:
    paper = Workload()
    group = p.add_argument_group("open-loop arrivals")
    group.add_argument("--arrivals", help="'slora', or a CSV trace")
    group.add_argument(
        "--num-adapters", type=int, help="default: all that the server lists; 0: the base alone"
    )
    group.add_argument("--alpha", type=float, default=paper.alpha, help="popularity: rank^-alpha")
    group.add_argument("--rate", type=float, default=paper.rate, help="requests a second")
    group.add_argument("--cv", type=float, default=paper.cv, help="of the gaps; 1 is Poisson")
    group.add_argument("--duration-s", type=float, help="default: 300, or the whole trace")
    group.add_argument("--input-range", type=_range, default=paper.input_tokens, metavar="LOW-HIGH")
    group.add_argument(
        "--output-range", type=_range, default=paper.output_tokens, metavar="LOW-HIGH"
    )
    group.add_argument("--own-processes", action="store_true", help="one Gamma process an adapter")
    group.add_argument("--speed", type=float, default=1.0, help="of a trace")
    group.add_argument("--max-input", type=int, help="cut a trace's prompts to so many tokens")
    group.add_argument("--max-output", type=int, help="cut a trace's answers likewise")


def timed_requests(args: argparse.Namespace, listed: int) -> list[TimedRequest]:
    """What ``--arrivals`` asks for, over ``listed`` adapters unless the command line says so.

    Raises ValueError, OSError.
    """
    adapters = listed if args.num_adapters is None else args.num_adapters
    if args.arrivals == "slora":
        return generate(
            Workload(
                adapters=adapters,
                alpha=args.alpha,
                rate=args.rate,
                cv=args.cv,
                duration_s=args.duration_s or Workload().duration_s,
                input_tokens=args.input_range,
                output_tokens=args.output_range,
                pooled=not args.own_processes,
                seed=args.seed,
            )
        )
    requests = adapted(
        read_trace(Path(args.arrivals)),
        speed=args.speed,
        first_s=args.duration_s or math.inf,
        max_input=args.max_input,
        max_output=args.max_output,
    )
    if adapters and all(request.adapter is None for request in requests):
        return spread(requests, adapters, args.alpha, args.seed)
    return requests


async def bench_arrivals(args: argparse.Namespace, load: Load, names: Sequence[str]) -> Played:
    """Plays what ``--arrivals`` asks for. Raises ValueError, OSError."""
    requests = timed_requests(args, len(names))
    if not args.no_warm_up:
        await warm_up(load, [load.model])
    return await play(load, requests, names, label=Path(args.arrivals).name)


async def bench(args: argparse.Namespace) -> tuple[Load, list[Summary] | Played]:
    """Runs every cell that the command line asks for, or plays its arrivals."""
    listed = await served_models(args.base_url, args.api_key)
    base = args.model or listed[0]
    names = sorted(m for m in listed if m != base and m.startswith(args.adapter_prefix))
    load = Load(
        base_url=args.base_url,
        model=base,
        endpoint=args.endpoint,
        prompt_format=args.prompt_format,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        ignore_eos=args.ignore_eos,
        api_key=args.api_key,
        vocab_size=args.vocab_size,
        seed=args.seed,
        timeout_s=args.timeout_s,
        progress=not args.no_progress,
    )
    if args.arrivals:
        return load, await bench_arrivals(args, load, names)
    cells = make_cells(
        args.adapters.split(","),
        base,
        names,
        [int(c) for c in args.concurrency.split(",")],
        lambda c: args.requests or default_requests(c, quick=args.quick),
    )
    if not args.no_warm_up:
        await warm_up(load, sorted({m for cell in cells for m in cell.models}))
    return load, [await run_cell(load, cell) for cell in cells]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a request failed."""
    args = parse(argv)
    load, result = asyncio.run(bench(args))
    summaries = [result.summary] if isinstance(result, Played) else result
    cells = [result.as_dict()] if isinstance(result, Played) else [s.as_dict() for s in summaries]
    report = {
        "base_url": load.base_url,
        "model": load.model,
        "endpoint": load.endpoint,
        "input_tokens": load.input_tokens,
        "output_tokens": load.output_tokens,
        "cells": cells,
    }
    text = json.dumps(report, indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    print(table(summaries), file=sys.stderr)
    if isinstance(result, Played):
        offered, late = result.offered_request_s, result.late_p99_ms
        print(f"offered {offered:.2f} req/s; sent late by {late:.1f} ms (p99)", file=sys.stderr)
    for summary in summaries:
        for kind, count in summary.error_kinds.items():
            print(
                f"c={summary.concurrency} a={summary.adapters}: {count} x {kind}", file=sys.stderr
            )
    return 1 if any(s.errors for s in summaries) else 0


if __name__ == "__main__":
    sys.exit(main())
