"""The whole serving benchmark in one command: our server over the matrix, and the libraries' own
generation beside it.

    python loadtests/run_serve_bench.py                    # about an hour on two cores
    python loadtests/run_serve_bench.py --quick --rounds 1

Every round visits every cell once (our server, the server without adapter layers, PEFT's mixed
batch, transformers' generate), so that a machine that changes its speed changes it for all. Medians
over the rounds go to a CSV file under loadtests/results with machine, versions and command; ratios
against the bars are printed at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import orjson
from bench_load import Cell, Load, default_requests, run_cell, served_models, warm_up
from bench_report import Row, Sample, bars, environment, reduce_rounds, render, write_csv
from make_adapters import make_adapters
from server_process import LocalPeer, ServerProcess
from tqdm import tqdm

from manyhats.config import Settings
from manyhats.engine.model.default import ensure_default_model

HERE = Path(__file__).resolve().parent
BASE_ONLY = "manyhats-no-adapter-layers"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which cells of the matrix are run, and on what."""

    concurrencies: tuple[int, ...]
    adapters: tuple[int, ...]
    all_r16: list[Path]
    qv_r8: list[Path]
    quick: bool

    def cells(self, base: str) -> list[tuple[str, Cell]]:
        """(kind of adapter, cell) pairs.

        32 adapters of rank 8 on q and v come once, at the largest concurrency.
        """
        made = []
        for concurrency in self.concurrencies:
            requests = default_requests(concurrency, quick=self.quick)
            for count in self.adapters:
                models = [f.name for f in self.all_r16[:count]] or [base]
                kind = "all-r16" if count else "none"
                made.append((kind, Cell(concurrency, requests, models, count)))
        top = max(self.concurrencies)
        models = [f.name for f in self.qv_r8]
        made.append(
            ("qv-r8", Cell(top, default_requests(top, quick=self.quick), models, len(models)))
        )
        return made


async def start_servers(
    args: argparse.Namespace, plan: Plan, stack: ExitStack
) -> dict[str, ServerProcess]:
    """Our server with every adapter registered and, if asked, one without adapter layers."""
    common = [
        "--model",
        str(args.model),
        "--quantization",
        args.quantization,
        "--dtype",
        args.dtype,
        "--device",
        args.device,
        *args.server_flag,
    ]
    folders = [*plan.all_r16, *plan.qv_r8]
    ours = ["--adapter-root", str(args.work / "adapters"), "--slots", str(max(64, len(folders)))]
    wanted = {"manyhats": [*common, *ours]}
    if not args.skip_base_only:
        wanted[BASE_ONLY] = [*common, "--no-adapter-layers"]
    servers = {}
    for name, flags in wanted.items():
        home = args.work / name  # a registry belongs to one process
        server = ServerProcess([*flags, "--home", str(home)], args.work / f"{name}.log")
        stack.callback(server.stop)
        tqdm.write(f"{name}: ready after {await server.wait_ready():.1f} s", file=sys.stderr)
        servers[name] = server
    await servers["manyhats"].register(folders)
    return servers


def start_peers(args: argparse.Namespace, plan: Plan, stack: ExitStack) -> dict[str, LocalPeer]:
    """The workers for transformers' and PEFT's own generation."""
    flags = [
        "--model",
        str(args.model),
        "--quantization",
        args.quantization,
        "--dtype",
        args.dtype,
        "--batch",
        str(max(plan.concurrencies)),
        "--input-tokens",
        str(args.input_tokens),
        "--output-tokens",
        str(args.output_tokens),
        "--vocab-size",
        str(args.vocab_size),
        "--device",
        "cpu" if args.device == "auto" else args.device,
    ]
    wanted = {
        "transformers": ["--mode", "transformers"],
        "peft": ["--mode", "peft", "--adapters", *map(str, plan.all_r16)],
    }
    peers = {}
    for name in args.peers:
        peers[name] = LocalPeer([*wanted[name], *flags], args.work / f"{name}.log")
        stack.callback(peers[name].stop)
        tqdm.write(f"{name}: ready", file=sys.stderr)
    return peers


async def one_round(
    number: int,
    load: Load,
    plan: Plan,
    servers: dict[str, ServerProcess],
    peers: dict[str, LocalPeer],
) -> list[Sample]:
    """Every cell once; the two servers take turns cell by cell."""
    samples = []
    for kind, cell in plan.cells(load.model):
        for name, server in servers.items():
            if name == BASE_ONLY and cell.adapters:
                continue
            # A label of its own: the same prompts in two rounds would meet the prefix cache.
            labelled = replace(cell, label=f"{name} {kind} round {number}")
            summary = await run_cell(replace(load, base_url=server.base_url), labelled)
            samples.append(Sample.of_summary(name, kind, summary))
    for name, peer in peers.items():
        tqdm.write(f"{name} round {number} ...", file=sys.stderr)
        adapters = len(plan.all_r16) if name == "peft" else 0
        result = await asyncio.to_thread(peer.batch)
        samples.append(
            Sample(
                name, "all-r16" if adapters else "none", max(plan.concurrencies), adapters, result
            )
        )
    return samples


async def warm_all(load: Load, plan: Plan, servers: dict[str, ServerProcess]) -> None:
    """Every adapter once, so that it is resident; then a short full batch, for the shapes."""
    top = max(plan.concurrencies)
    for name, server in servers.items():
        at = replace(load, base_url=server.base_url)
        folders = [] if name == BASE_ONLY else [*plan.all_r16, *plan.qv_r8]
        await warm_up(at, [load.model, *(folder.name for folder in folders)])
        full = Cell(top, top, [load.model], 0, label=f"{name} warm-up")
        await run_cell(replace(at, output_tokens=8), full)


async def run(args: argparse.Namespace, keep: Callable[[list[Row]], None]) -> list[Row]:
    """Starts everything, runs the rounds, stops everything; ``keep`` gets the rows so far."""
    adapters = args.work / "adapters"
    config = args.model / "config.json"
    count = max(*args.adapters, 1)
    plan = Plan(
        concurrencies=tuple(args.concurrency),
        adapters=tuple(args.adapters),
        all_r16=make_adapters(config, adapters, count=count, rank=16, targets="all"),
        qv_r8=make_adapters(config, adapters, count=count, rank=8, targets="qv"),
        quick=args.quick,
    )
    args.vocab_size = int(orjson.loads(config.read_bytes())["vocab_size"])
    samples: list[Sample] = []
    with ExitStack() as stack:
        peers = start_peers(args, plan, stack)
        servers = await start_servers(args, plan, stack)
        base = (await served_models(servers["manyhats"].base_url, None))[0]
        load = Load(
            base_url="",
            model=base,
            input_tokens=args.input_tokens,
            output_tokens=args.output_tokens,
            ignore_eos=True,
            vocab_size=args.vocab_size,
            seed=args.seed,
        )
        await warm_all(load, plan, servers)
        for number in range(1, args.rounds + 1):
            samples += await one_round(number, load, plan, servers, peers)
            memory = {name: server.peak_mib() for name, server in servers.items()}
            rows = reduce_rounds(samples, memory)
            keep(rows)
    return rows


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model", type=Path, help="local folder of a Llama-shaped base; default: the server's own"
    )
    p.add_argument("--quantization", choices=["nf4", "fp4", "int8", "none"], default="nf4")
    p.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--concurrency", type=_numbers, default=[1, 8, 32])
    p.add_argument("--adapters", type=_numbers, default=[0, 1, 8, 32])
    p.add_argument("--input-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=128)
    p.add_argument("--rounds", type=int, choices=range(1, 101), metavar="N", default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--quick", action="store_true", help="one wave of requests a cell instead of two"
    )
    p.add_argument(
        "--peers", nargs="*", choices=["transformers", "peft"], default=["transformers", "peft"]
    )
    p.add_argument("--skip-base-only", action="store_true", help="no server without adapter layers")
    p.add_argument(
        "--server-flag",
        action="append",
        default=[],
        help="passed on, e.g. --server-flag=--threads=2",
    )
    p.add_argument(
        "--work", type=Path, help="generated adapters and logs; default: under MANYHATS_HOME"
    )
    p.add_argument("--out", type=Path, help="CSV; default: loadtests/results/serve_bench-DATE.csv")
    p.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    args = p.parse_args(argv)
    home = Settings().home
    args.work = (args.work or home / "loadtests").resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.model = (args.model or ensure_default_model(home)).resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes its results.

    1 when a request failed or, with --check, a bar was missed.
    """
    started = datetime.now(UTC)
    args = parse(argv)
    out = args.out or HERE / "results" / f"serve_bench-{started:%Y%m%d-%H%M}.csv"
    # After every round, so that a run that is cut short keeps what it has measured.
    rows = asyncio.run(run(args, lambda rows: write_csv(out, rows, environment(started, args))))
    print(render(rows))
    print()
    missed = 0
    for bar in bars(rows):
        missed += not bar.met
        print(bar)
    print(f"\nwritten to {out}")
    return 1 if any(row.errors for row in rows) or (args.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
