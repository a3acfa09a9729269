"""Measure tiles on this machine's CUDA device and write the best into the table.

    python loadtests/kernels/tune.py            # prints the rows
    python loadtests/kernels/tune.py --write    # puts them into tiles.json, in place of its chip's

For each operation, phase and width the shrink is chosen first, then the expand beside it, each by
the median time of shrink and expand together. A tile whose result is not the reference's, or that
does not compile (too much shared memory), is passed over and named. Afterwards
``compile_report.py --write`` brings docs/kernels.md up to date.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator

import torch
import triton
from gpu_timing import Shape, measure
from triton.runtime.errors import OutOfResources

from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.testing import assert_close
from manyhats_kernels.triton.lora import Launcher
from manyhats_kernels.triton.plan import token_tiles
from manyhats_kernels.triton.tiles import ANY, Tile, TileTable

WIDTHS = {"shrink": (2048, 0), "expand": (0,)}
SHAPES = {
    ("decode", 2048): Shape(32, 32, 16, 1024, 4096),
    ("decode", 0): Shape(32, 32, 16, 8192, 4096),
    ("prefill", 2048): Shape(1024, 2, 16, 1024, 4096),
    ("prefill", 0): Shape(1024, 2, 16, 8192, 4096),
}
"""What stands for a phase and a width: by (phase, up_to) of the shrink."""

SPANS = {"shrink": (64, 128, 256), "expand": (64, 128, 256)}
SPLITS = {"decode": (2, 4, 8, 16), "prefill": (1, 2)}


def candidates(chip: str, op: str, phase: str, bits: int, up_to: int) -> Iterator[Tile]:
    """Every tile that is tried for a place of the table."""
    splits = SPLITS[phase] if op == "shrink" else (1,)
    for span, split, ranks, warps, stages in itertools.product(
        SPANS[op], splits, (16, 32), (4, 8), (2, 3, 4)
    ):
        if op == "shrink" or stages == 2:
            yield Tile(chip, op, phase, bits, up_to, ranks, span, split, warps, stages)


def seconds(tiles: tuple[Tile, ...], chip: str, shape: Shape, dtype: torch.dtype) -> float:
    """Median microseconds of a site's shrink and expand with ``tiles`` before the others'."""
    launcher = Launcher(TileTable((*tiles, *TileTable.load().rows)), chip)
    plan = shape.plan()
    cut = token_tiles(plan)
    x, sites = shape.sites(shape.copies(256, dtype.itemsize), dtype)
    first = sites[0]
    launcher.add([first], x, cut, max_rows=256)
    few = slice(0, 64)  # the reference goes token by token
    expected = torch.zeros_like(first.y)
    ReferenceBackend().lora_add(expected, x, first.a, first.b, first.rows, plan)
    assert_close(first.y[few], expected[few])
    calls = [lambda s=site: launcher.add([s], x, cut, max_rows=256) for site in sites]
    return measure(calls, rounds=30).median


def best(
    chip: str, op: str, phase: str, bits: int, up_to: int, beside: tuple[Tile, ...]
) -> Tile | None:
    """The fastest right tile for a place, None if the table's own is faster than all."""
    shape = SHAPES[phase, up_to]
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    chosen, least = None, seconds(beside, chip, shape, dtype)
    print(f"{op} {phase} {bits} bits up to {up_to}: {least:.1f} us as it is", flush=True)
    for tile in candidates(chip, op, phase, bits, up_to):
        try:
            taken = seconds((tile, *beside), chip, shape, dtype)
        except (OutOfResources, AssertionError) as error:
            print(f"  passed over: {tile}: {error}", flush=True)
            continue
        if taken < least:
            chosen, least = tile, taken
            print(f"  {taken:.1f} us: {tile}", flush=True)
    return chosen


def main() -> int:
    """Tune every place of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(16, 32), default=16)
    parser.add_argument("--write", action="store_true", help="into the table that is served")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune.py needs a CUDA device", file=sys.stderr)
        return 1
    major, minor = torch.cuda.get_device_capability()
    chip = f"sm_{major}{minor}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    found: list[Tile] = []
    for op in ("shrink", "expand"):
        for phase, up_to in itertools.product(SPLITS, WIDTHS[op]):
            tile = best(chip, op, phase, options.bits, up_to, tuple(found))
            if tile is not None:
                found.append(tile)
    for tile in found:
        print(dataclasses.asdict(tile))
    if options.write:
        rows = TileTable.load().rows
        kept = [row for row in rows if (row.chip, row.bits) != (chip, options.bits)]
        TileTable.dump((*found, *(r for r in kept if r.chip != ANY), *_any(kept)))
    return 0


def _any(rows: list[Tile]) -> list[Tile]:
    """The rows for every chip, which stand last."""
    return [row for row in rows if row.chip == ANY]


if __name__ == "__main__":
    sys.exit(main())
