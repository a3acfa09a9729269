"""Compile every Triton kernel for sm_80 and sm_90, without a GPU, and report what it takes.

Every specialization that the launchers' tables lead to: those of ``aot/adapters.py``,
``aot/fourbit.py`` and ``aot/attention.py``.

    python loadtests/kernels/compile_report.py            # the table, checked
    python loadtests/kernels/compile_report.py --json     # the same for programs
    python loadtests/kernels/compile_report.py --write    # into docs/kernels.md

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
from aot.compiler import Row, compiled

from manyhats_kernels.triton.tiles import TileTable

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


def main() -> int:
    """Compile everything, tell it, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    options = parser.parse_args()
    # No instruction differs without the line tables, and a sixth of the time goes into them.
    triton.knobs.compilation.disable_line_info = True
    table = TileTable.load()
    cases = itertools.chain(adapters.cases(table), fourbit.cases(table), attention.cases())
    report = [compiled(case, target) for case in cases for target in case.targets()]
    if options.write:
        text = DOCUMENT.read_text("utf-8")
        head, _, rest = text.partition(BEGIN)
        tail = rest.partition(END)[2]
        DOCUMENT.write_text(f"{head}{BEGIN}\n{markdown(report)}\n{END}{tail}", "utf-8")
    elif options.json:
        print(json.dumps([dataclasses.asdict(row) for row in report]))
    else:
        print(markdown(report))
    problems = [row.problem for row in report if row.problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
