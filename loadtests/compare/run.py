"""Manyhats beside every peer that can be had here: the same seeded workloads, in turn, in rounds.

    python loadtests/compare/run.py --install           # the peers' environments alone
    python loadtests/compare/run.py --rounds 3 --check  # the whole comparison
    python loadtests/compare/run.py --report RAW.jsonl  # tables, bars and plots of an earlier run

One server at a time is up. In every round each target is started, asked for its scenarios and
stopped; rounds begin with another target each, so that a machine that changes its speed changes it
for all. What cannot be installed or started is left out, and the table says why. A run that was cut
short goes on with the same --name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":  # its own folder has modules of names that libraries have
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from compare.arguments import context, options_of, parse, place_of
from compare.bars import Verdict, bars, judge
from compare.cells import Options
from compare.environments import UnavailableError, install
from compare.measured import Kept, Store
from compare.ours import MAIN
from compare.peers import RECIPES, chosen, prepare_files
from compare.registered import measure, prepare
from compare.report import ratios, render, rows_of, write_cells, write_ratios
from compare.target import MATRIX, REGISTERED, Place, Target
from compare.visits import FAILURES, visit

READY = "prepared"


def reason(error: Exception) -> str:
    """An error in one line: its last one that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def installed(targets: Sequence[Target], place: Place) -> tuple[list[Target], dict[str, str]]:
    """The targets whose peer is there, after installing what is not; the others with the reason."""
    missing: dict[str, str] = {}
    for peer in dict.fromkeys(target.peer for target in targets if target.peer):
        try:
            install(RECIPES[peer](), place.peers / peer)
            prepare_files(peer, place)
        except UnavailableError as error:
            missing[peer] = reason(error)
    left = [target for target in targets if target.peer not in missing]
    return left, {t.name: missing[t.peer] for t in targets if t.peer in missing}


async def prepared(
    targets: Sequence[Target], place: Place, options: Options
) -> tuple[list[Target], dict[str, str]]:
    """The targets that start here. Each is started once, unmeasured, so that what a first start
    makes and keeps (quantized weights, compiled code, registered adapters) is there.
    """
    left, skipped = [], {}
    short = replace(options, output_tokens=min(8, options.output_tokens), quick=True, every=False)
    for target in targets:
        marker = place.work / READY / target.name
        try:
            told = " ".join(target.launch(0).argv if target.launch else target.batch)
            if not marker.exists() or marker.read_text(encoding="utf-8") != told:
                await visit(target, place, short, 0, [MATRIX])
        except FAILURES as error:
            if not target.peer:
                raise  # our own server is not left out in silence
            skipped[target.name] = reason(error)
            continue
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(told, encoding="utf-8")
        left.append(target)
    return left, skipped


async def compare(args: argparse.Namespace, place: Place, options: Options, store: Store) -> None:
    """Installs, prepares and runs the rounds; every visit is kept at its end."""
    wanted = [t for t in chosen(place, args.targets) if t.scenarios & set(args.scenarios)]
    targets, skipped = installed(wanted, place)
    started, more = await prepared(targets, place, options)
    for name, why in {**skipped, **more}.items():
        store.skip(name, why)
    if REGISTERED in args.scenarios:
        await prepare(place, options)
    for number in range(1, options.rounds + 1):
        kept = store.read()
        turn = number % len(started) if started else 0
        for target in [*started[turn:], *started[:turn]]:
            if kept.visited(target.name, number):
                continue
            try:
                store.visit(await visit(target, place, options, number, args.scenarios))
            except FAILURES as error:
                if not target.peer:
                    raise
                store.skip(f"{target.name}, round {number}", reason(error))
        if REGISTERED in args.scenarios and not _has_registered(kept, number):
            store.visit(await measure(place, options, number))


def _has_registered(kept: Kept, number: int) -> bool:
    return any(m.scenario == REGISTERED and m.round == number for m in kept.measured)


def verdicts(kept: Kept, options: Options, wears: int) -> list[Verdict]:
    """Every bar, judged where both of its sides were measured."""
    rows = rows_of(kept.measured)
    most = max((s for s in options.sizes if s <= wears), default=0)
    return [judge(bar, rows) for bar in bars(most, options.registered, options.in_flight, wears)]


def tell(args: argparse.Namespace, kept: Kept, options: Options) -> int:
    """Tables, ratios, plots and bars; 1 with --check where a bar is missed, none was judged, or a
    request to Manyhats failed.
    """
    rows = rows_of(kept.measured)
    write_cells(args.out, kept)
    second = args.out.with_name(f"{args.out.stem}-ratios.csv")
    write_ratios(second, ratios(rows, MAIN), kept.context)
    print(render(kept))
    print()
    found = verdicts(kept, options, args.adapters)
    print(*found, sep="\n")
    print(f"\nwritten to {args.out} and {second.name}")
    if args.plots is not None:
        from compare.plots import draw

        for path in draw(kept.measured, args.plots):
            print(f"plotted {path}")
    judged = [verdict for verdict in found if verdict.judged]
    missed = [verdict for verdict in judged if not verdict.met]
    failed = [row for row in rows.values() if row.key[0].startswith(MAIN) and row.errors]
    return int(args.check and (bool(missed or failed) or not judged))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for."""
    started = datetime.now(UTC)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    args = parse(argv, started)
    if args.report is not None:
        return tell(args, Store(args.report).read(), options_of(args, None))
    place = place_of(args)
    if args.install:
        _, skipped = installed(chosen(place, args.targets), place)
        print(json.dumps(skipped, indent=2))
        return 0
    store = Store(place.work / f"{args.name}.jsonl")
    store.context(context(args, started))
    options = options_of(args, place)
    asyncio.run(compare(args, place, options, store))
    print(f"kept in {place.work / args.name}.jsonl", file=sys.stderr)
    return tell(args, store.read(), options)


if __name__ == "__main__":
    sys.exit(main())
