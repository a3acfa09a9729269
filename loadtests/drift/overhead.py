"""What drift detection at its defaults costs under load: two servers, turn by turn.

    python loadtests/drift/overhead.py --rounds 5 --out loadtests/results/drift_overhead.csv

One server watches (``--drift-share`` as it is by default), the other was started with
``--no-drift``. Every round loads each of them once, in turns (the order changes from round to
round), with the same cell of requests to demo adapters; the idle one costs nothing. What counts is
the ratio of a round's pair: medians of the ratios are printed, with their spread and with how many
requests were scored again, or dropped because the engine was busy. ``cpu_ms_per_request`` is the
server's own CPU time, rescoring included, which a busy machine blurs least. Rows are added to
``--out``. At 2 % a short run samples few: ``--server-flag=--drift-share=1`` shows the price of one.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench_load import Cell, Load, run_cell, served_models, warm_up  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from server_process import ServerProcess  # noqa: E402

from manyhats.config import Settings  # noqa: E402
from manyhats.engine.model.default import ensure_default_model  # noqa: E402

ADAPTERS = ("pirate", "robot", "legal", "bullets")
ON, OFF = "drift", "no-drift"
TIMES = ("output_tok_s", "itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms")
FIGURES = (*TIMES, "cpu_ms_per_request")
SETTLED_S = 0.5

Row = dict[str, str | int | float]


async def started(
    args: argparse.Namespace, work: Path, stack: ExitStack
) -> dict[str, ServerProcess]:
    """Both servers, ready, with the demo adapters."""
    usual = Settings().home
    model = ensure_default_model(usual)
    servers = {}
    for name, flags in ((ON, args.server_flag), (OFF, [*args.server_flag, "--no-drift"])):
        home = work / name
        home.mkdir()
        for kept in ("quantized", "kernels"):  # made at a first start: not again
            if (usual / kept).is_dir():
                (home / kept).symlink_to(usual / kept)
        roots = HERE.parents[1] / "examples/adapters"
        fixed = ["--model", str(model), "--home", str(home), "--adapter-root", str(roots)]
        server = ServerProcess([*fixed, "--no-parity-probe", *flags], work / f"{name}.log")
        stack.callback(server.stop)
        await server.wait_ready()
        await server.register([roots / adapter for adapter in ADAPTERS])
        servers[name] = server
    return servers


def samples(server: ServerProcess) -> dict[str, float]:
    """The counters of drift detection, summed over the adapters."""
    text = httpx.get(f"{server.base_url}/metrics", timeout=60).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in ("manyhats_drift_samples_total", "manyhats_drift_dropped_total"):
                kind = sample.labels.get("kind") or "dropped"
                found[kind] = found.get(kind, 0) + sample.value
    return found


async def settled(server: ServerProcess) -> dict[str, float]:
    """``samples`` once nothing more comes: what was sampled last is scored after the answers."""
    seen = samples(server)
    while True:
        await asyncio.sleep(SETTLED_S)
        now = samples(server)
        if now == seen and server_idle(server):
            return now
        seen = now


def server_idle(server: ServerProcess) -> bool:
    """Whether the engine computes nothing, by its own counter of steps."""

    def steps() -> str:
        lines = httpx.get(f"{server.base_url}/metrics", timeout=60).text.splitlines()
        return next(line for line in lines if line.startswith("manyhats_steps_total"))

    before = steps()
    time.sleep(SETTLED_S / 5)
    return steps() == before


async def rounds(args: argparse.Namespace, work: Path) -> list[Row]:
    """Every round's pair of cells."""
    made: list[Row] = []
    with ExitStack() as stack:
        servers = await started(args, work, stack)
        base = (await served_models(servers[ON].base_url, None))[0]
        vocab = json.loads((ensure_default_model(Settings().home) / "config.json").read_text())
        load = Load(
            "", base, input_tokens=args.input_tokens, output_tokens=args.output_tokens,
            ignore_eos=True, vocab_size=vocab["vocab_size"], seed=args.seed, progress=False,
        )  # fmt: skip
        count = args.concurrency
        for name, server in servers.items():
            at = replace(load, base_url=server.base_url)
            await warm_up(at, list(ADAPTERS))
            full = Cell(count, count, ADAPTERS, len(ADAPTERS), label=f"{name} warm-up {args.seed}")
            await run_cell(replace(at, output_tokens=8), full)
        for number in range(1, args.rounds + 1):
            for name in (ON, OFF) if number % 2 else (OFF, ON):
                before, spent = samples(servers[name]), servers[name].cpu_s()
                label = f"{name} round {number} seed {args.seed}"  # no prompt twice
                cell = Cell(count, args.requests, ADAPTERS, len(ADAPTERS), label=label)
                summary = await run_cell(replace(load, base_url=servers[name].base_url), cell)
                now = await settled(servers[name])
                spent = servers[name].cpu_s() - spent
                told = {k: v - before.get(k, 0) for k, v in now.items()}
                row: Row = {"round": number, "server": name, "errors": summary.errors}
                row |= {key: round(getattr(summary, key), 3) for key in TIMES}
                row["cpu_ms_per_request"] = round(1000 * spent / args.requests, 2)
                row |= {k: int(told.get(k, 0)) for k in ("finished", "rescored", "dropped")}
                made.append(row)
                print(row, file=sys.stderr, flush=True)
    return made


def ratios(rows: Sequence[Mapping[str, str | int | float]], figure: str) -> list[float]:
    """Watched over unwatched, a round each."""
    pairs = [(r, s) for r, s in zip(rows[::2], rows[1::2], strict=True)]
    both = [{str(row["server"]): float(row[figure]) for row in pair} for pair in pairs]
    return [pair[ON] / pair[OFF] for pair in both]


def told(rows: Sequence[Mapping[str, str | int | float]]) -> str:
    """The ratios in words."""
    lines = []
    for figure in FIGURES:
        found = sorted(ratios(rows, figure))
        lines.append(
            f"{figure}: {statistics.median(found):.3f} of the unwatched server "
            f"({found[0]:.3f} to {found[-1]:.3f} in {len(found)} rounds)"
        )
    seen = [row for row in rows if row["server"] == ON]
    totals = {k: sum(int(row[k]) for row in seen) for k in ("finished", "rescored", "dropped")}
    return "\n".join([*lines, str(totals)])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a request failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96, help="of a cell")
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0, help="another one for another run")
    parser.add_argument("--server-flag", action="append", default=[])
    parser.add_argument("--out", type=Path, help="CSV that the rows are added to")
    parser.add_argument("--read", type=Path, help="no run: the ratios of such a file")
    args = parser.parse_args(argv)
    if args.read:
        print(told(list(csv.DictReader(args.read.open(encoding="utf-8")))))
        return 0
    with tempfile.TemporaryDirectory() as work:
        rows = asyncio.run(rounds(args, Path(work)))
    if args.out:
        begun = {"at": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}", "seed": args.seed}
        new = not args.out.exists()
        with args.out.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*begun, *rows[0]])
            if new:
                writer.writeheader()
            writer.writerows({**begun, **row} for row in rows)
    print(told(rows))
    return 1 if any(row["errors"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
