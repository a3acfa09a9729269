"""Loads any OpenAI-compatible server with streaming requests and reports throughput and latency.

    python loadtests/serve_bench.py --base-url http://127.0.0.1:8000 --concurrency 1,8,32 --adapters
    0,1,8 --ignore-eos

A cell is one concurrency with one number of adapters; requests take the adapters in turn (0: the
base model). The table goes to stderr, the JSON to stdout. Every prompt is different, so that no
prefix cache can help.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_load import Cell, Load, default_requests, run_cell, served_models, warm_up
from bench_stats import Summary, table


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
    p.add_argument("--json", type=Path, help="write the JSON here instead of to stdout")
    return p.parse_args(argv)


async def bench(args: argparse.Namespace) -> tuple[Load, list[Summary]]:
    """Runs every cell that the command line asks for."""
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
    load, summaries = asyncio.run(bench(args))
    report = {
        "base_url": load.base_url,
        "model": load.model,
        "endpoint": load.endpoint,
        "input_tokens": load.input_tokens,
        "output_tokens": load.output_tokens,
        "cells": [s.as_dict() for s in summaries],
    }
    text = json.dumps(report, indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    print(table(summaries), file=sys.stderr)
    for summary in summaries:
        for kind, count in summary.error_kinds.items():
            print(
                f"c={summary.concurrency} a={summary.adapters}: {count} x {kind}", file=sys.stderr
            )
    return 1 if any(s.errors for s in summaries) else 0


if __name__ == "__main__":
    sys.exit(main())
