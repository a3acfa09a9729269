"""Compile every Triton kernel for sm_80 and sm_90, without a GPU, and report what it takes.

Every tile of the table is compiled as a launch would on tensors whose addresses and strides are
multiples of 16: 16-bit tiles in bf16, 32-bit ones in fp32. Registers and stack are read from the
cubin, shared memory from Triton's metadata. A stack is where registers are spilled to.

    python loadtests/kernels/compile_report.py            # the table, checked
    python loadtests/kernels/compile_report.py --json     # the same for programs
    python loadtests/kernels/compile_report.py --write    # into docs/kernels.md

Exits with 1, naming the kernel, when one spills or wants more shared memory than its chip has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from manyhats_kernels.triton import lora_kernels, row_kernels, rows
from manyhats_kernels.triton.tiles import ANY, Tile, TileTable

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- compile_report: begin -->", "<!-- compile_report: end -->"

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block can have (CUDA C Programming Guide)."""

SMALLEST_SHARED_LIMIT = 99 * 1024
"""The same on sm_86 and sm_89, for tiles that any chip from sm_80 on takes."""


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel, the types of its arguments and its constants."""

    name: str
    chip: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int


@dataclass(frozen=True)
class Row:
    """What one variant compiled to."""

    kernel: str
    target: int
    warps: int
    registers: int
    stack: int
    shared: int

    @property
    def problem(self) -> str:
        """What is wrong with it, empty if nothing."""
        limit = SHARED_LIMIT[self.target]
        if self.kernel.endswith(ANY):
            limit = min(limit, SMALLEST_SHARED_LIMIT)
        if self.stack:
            return f"{self.kernel} on sm_{self.target} spills: a stack of {self.stack} bytes"
        if self.shared > limit:
            return f"{self.kernel} on sm_{self.target} wants {self.shared} of {limit} bytes shared"
        return ""


def variants(table: TileTable) -> Iterator[Variant]:
    """Every kernel with every tile; an expand with each split that it can meet, plain and not."""
    for tile in table.rows:
        if tile.op == "shrink":
            yield lora_variant(tile, tile.name, tile.split, between=False)
            continue
        met = {t.split for t in table.rows if (t.op, t.phase, t.bits) == ("shrink", *key(tile))}
        for split in sorted(met):
            yield lora_variant(tile, f"split{split}-{tile.name}", split, between=False)
        yield lora_variant(tile, f"bottleneck-{tile.name}", max(met), between=True)
    for name, flag in (("bias", False), ("scale", True)):
        yield row_variant(name, row_kernels.row_kernel, {"SCALE": flag})
    for name, flag in (("norm-rms", False), ("norm-layer", True)):
        yield row_variant(name, row_kernels.norm_kernel, {"CENTERED": flag})


def row_variant(name: str, kernel: Any, flags: dict[str, bool]) -> Variant:
    """A kernel of row_kernels.py in bf16."""
    constants = {**flags, "BLOCK_N": rows.COLUMNS}
    types = dict.fromkeys(("y", "x", "values", "gain", "shift"), "*bf16")
    types |= {"slots": "*i32", "has": "*i32", "eps": "fp32"}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    return Variant(name, ANY, kernel, signature, constants, rows.WARPS, 1)


def key(tile: Tile) -> tuple[str, int]:
    """What an expand and its shrink have in common."""
    return tile.phase, tile.bits


def lora_variant(tile: Tile, name: str, split: int, *, between: bool) -> Variant:
    """The shrink or expand with ``tile``; ``between`` gives the expand a bottleneck's arguments."""
    shrink = tile.op == "shrink"
    kernel = lora_kernels.shrink_kernel if shrink else lora_kernels.expand_kernel
    value = "*bf16" if tile.bits == 16 else "*fp32"
    constants: dict[str, Any] = {
        "BLOCK_T": tile.tokens,
        "BLOCK_R": tile.ranks,
        ("BLOCK_K" if shrink else "BLOCK_N"): tile.span,
        "SPLIT_K": split,
        "PRECISION": "ieee" if shrink or tile.bits == 32 else "tf32x3",
    }
    types = {
        "mid": "*fp32",
        "order": "*i32",
        "tiles": "*i32",
        "kinds": "*i32",
        "down_bias": "*fp32",
        "x": value,
    }
    if not shrink and not between:
        constants |= dict.fromkeys(("down_bias", "kinds"))
    signature = {}
    for argument in kernel.arg_names:
        plain = argument.rstrip("012")
        if argument in constants:
            signature[argument] = "constexpr"
        elif plain in ("a", "b", "y"):
            signature[argument] = value
        elif plain in ("start", "count"):
            signature[argument] = "*i32"
        else:
            signature[argument] = types.get(argument, "i32")
    return Variant(name, tile.chip, kernel, signature, constants, tile.warps, tile.stages)


def compiled(variant: Variant, target: int) -> Row:
    """Compile and read the report."""
    aligned = [
        name
        for name, kind in variant.signature.items()
        if kind.startswith("*") or name.startswith(("stride", "n_")) or name == "n"
    ]
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        {name: variant.signature[name] for name in names},
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    result = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            "enable_fp_fusion": True,
        },
    )
    used = resources(result.asm["cubin"])
    return Row(
        kernel=variant.name,
        target=target,
        warps=variant.warps,
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=result.metadata.shared,
    )


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the only kernel in a cubin, from NVIDIA's cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}


def markdown(rows: list[Row]) -> str:
    """The table of the document."""
    lines = [
        f"Written by `python loadtests/kernels/compile_report.py --write` with triton "
        f"{triton.__version__}.",
        "",
        "| kernel and tile | chip | warps | registers | spilled bytes | shared bytes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.kernel} | sm_{r.target} | {r.warps} | {r.registers} | {r.stack} | {r.shared} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Compile everything, tell it, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    options = parser.parse_args()
    report = [
        compiled(variant, target)
        for variant in variants(TileTable.load())
        for target in SHARED_LIMIT
        if variant.chip in (ANY, f"sm_{target}")
    ]
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
