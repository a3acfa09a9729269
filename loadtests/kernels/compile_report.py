"""Compile every Triton kernel for sm_80 and sm_90, without a GPU, and report what it takes.

Every specialization that the launchers' tables lead to: those of ``aot/adapters.py``,
``aot/fourbit.py`` and ``aot/attention.py``.

    python loadtests/kernels/compile_report.py            # the table, checked
    python loadtests/kernels/compile_report.py --json     # the same for programs
    python loadtests/kernels/compile_report.py --write    # into docs/kernels.md and compiled.json
    python loadtests/kernels/compile_report.py --changed  # compile what compiled.json does not have

A kernel compiles to the same each time, so ``--changed`` takes from compiled.json what has the same
source, types, constants, options and Triton as when it was written, all but the first.

Exits with 1, naming the kernel, when one spills, wants more shared memory than its chip has, or
multiplies 16-bit values without tensor cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import triton
from aot import adapters, attention, fourbit
from aot.compiler import Row, compiled, fingerprint

from manyhats_kernels.triton.tiles import TileTable

RECORD = Path(__file__).with_name("compiled.json")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- compile_report: begin -->", "<!-- compile_report: end -->"


def markdown(rows: list[Row]) -> str:
    """The table of the document."""
    columns = "kernel and tile", "chip", "warps", "registers", "spilled bytes", "shared bytes"
    lines = [
        f"Written by `python loadtests/kernels/compile_report.py --write` with triton "
        f"{triton.__version__}.",
        "",
        f"| {' | '.join(columns)} | tensor cores |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [
        f"| {r.kernel} | sm_{r.target} | {r.warps} | {r.registers} | {r.stack} | {r.shared} "
        f"| {'yes' if r.tensor_cores else 'no'} |"
        for r in rows
    ]
    return "\n".join(lines)


def report(*, changed: bool) -> dict[str, Row]:
    """What every case compiles to, by its fingerprint."""
    known = json.loads(RECORD.read_text("utf-8")) if changed else {}

    cases = itertools.chain(adapters.cases(TileTable.load()), fourbit.cases(), attention.cases())
    found: dict[str, Row] = {}
    for case in cases:
        for target in case.targets():
            name = fingerprint(case, target)
            recorded = known.get(name) if found else None
            found[name] = compiled(case, target) if recorded is None else Row(**recorded)
    return found


def main() -> int:
    """Compile everything, tell it, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md, compiled.json")
    parser.add_argument("--changed", action="store_true", help="compile what is not recorded")
    options = parser.parse_args()
    # No instruction differs without the line tables, and a sixth of the time goes into them.
    triton.knobs.compilation.disable_line_info = True
    found = report(changed=options.changed)
    rows = list(found.values())
    if options.write:
        text = DOCUMENT.read_text("utf-8")
        head, _, rest = text.partition(BEGIN)
        tail = rest.partition(END)[2]
        DOCUMENT.write_text(f"{head}{BEGIN}\n{markdown(rows)}\n{END}{tail}", "utf-8")
        record = {name: dataclasses.asdict(row) for name, row in found.items()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    elif options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        print(markdown(rows))
    problems = [row.problem for row in rows if row.problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
