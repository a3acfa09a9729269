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
from manyhats_kernels.triton.tiles import Tile, TileTable

WIDTHS = {"shrink": (2048, 0), "expand": (0,)}
SHAPES = {
    ("decode", 2048): Shape(32, 32, 16, 1024, 4096),
    ("decode", 0): Shape(32, 32, 16, 8192, 4096),
    ("prefill", 2048): Shape(1024, 2, 16, 1024, 4096),
    ("prefill", 0): Shape(1024, 2, 16, 8192, 4096),
}
"""What stands for a phase and a width: by (phase, up_to)."""

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


class Place:
    """The sites that stand for a place of the table, and what is right there."""

    def __init__(self, chip: str, shape: Shape, dtype: torch.dtype) -> None:
        self._chip = chip
        self._plan = shape.plan()
        self._tiles = token_tiles(self._plan)
        self._x, self._sites = shape.sites(shape.copies(256, dtype.itemsize), dtype)
        first = self._sites[0]
        self._right = torch.zeros_like(first.y)
        ReferenceBackend().lora_add(self._right, self._x, first.a, first.b, first.rows, self._plan)

    def microseconds(self, tiles: tuple[Tile, ...]) -> float:
        """Median of a site's shrink and expand with ``tiles`` before the table's others."""
        launcher = Launcher(TileTable((*tiles, *TileTable.load().rows)), self._chip)
        calls = [
            lambda s=site: launcher.add([s], self._x, self._tiles, max_rows=256)
            for site in self._sites
        ]
        self._sites[0].y.zero_()
        calls[0]()
        assert_close(self._sites[0].y, self._right)
        return measure(calls, rounds=30).median


def best(
    chip: str, op: str, phase: str, bits: int, up_to: int, beside: tuple[Tile, ...]
) -> Tile | None:
    """The fastest right tile for a place, None if the table's own is faster than all."""
    place = Place(chip, SHAPES[phase, up_to], torch.bfloat16 if bits == 16 else torch.float32)
    chosen, least = None, place.microseconds(beside)
    print(f"{op} {phase} {bits} bits up to {up_to}: {least:.1f} us as it is", flush=True)
    for tile in candidates(chip, op, phase, bits, up_to):
        try:
            taken = place.microseconds((tile, *beside))
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
        TileTable.dump((*found, *kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
