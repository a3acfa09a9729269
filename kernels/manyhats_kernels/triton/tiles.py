"""Which tile each launch takes: a table by chip, operation, phase, value size and width.

The table is ``tiles.json``, rows in order, the first that fits is taken. Rows of chip ``any`` were
chosen by counting bytes and registers, not measured; ``loadtests/kernels/tune.py`` measures on a
GPU and writes rows of its chip before them. ``docs/kernels.md`` says what each compiles to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from manyhats_kernels.triton.plan import DECODE_TOKENS, PREFILL_TOKENS

TABLE = Path(__file__).with_name("tiles.json")
OPERATIONS = ("shrink", "expand")
PHASES = {"decode": DECODE_TOKENS, "prefill": PREFILL_TOKENS}
ANY = "any"


@dataclass(frozen=True)
class Tile:
    """One row of the table. ValueError, naming the field, when a value cannot be launched.

    It holds for launches of ``op`` over ``bits``-wide values whose width (the inputs of a shrink,
    the outputs of an expand) is at most ``up_to`` (0: any). ``ranks`` rank rows and ``span``
    columns are a step of the inner loop, ``split`` programs share the columns of a shrink.
    """

    chip: str  # "sm_90", or ANY
    op: str
    phase: str
    bits: int
    up_to: int
    ranks: int
    span: int
    split: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, allowed in (
            ("op", OPERATIONS),
            ("phase", tuple(PHASES)),
            ("bits", (16, 32)),
            ("ranks", (16, 32, 64, 128)),
            ("span", (16, 32, 64, 128, 256, 512)),
            ("split", (1, 2, 4, 8, 16)),
            ("warps", (1, 2, 4, 8)),
            ("stages", (1, 2, 3, 4, 5)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} of a tile must be one of {allowed}, got {getattr(self, name)!r}"
                )
        if self.up_to < 0:
            raise ValueError(f"up_to of a tile must be >= 0, got {self.up_to}")
        if self.op == "expand" and self.split != 1:
            raise ValueError(f"split of an expand must be 1, got {self.split}")

    @property
    def name(self) -> str:
        """What reports and tests call it."""
        width = f"-to{self.up_to}" if self.up_to else ""
        return f"{self.op}-{self.phase}-{self.bits}bit{width}-{self.chip}"

    @property
    def tokens(self) -> int:
        """Tokens of a tile in this phase."""
        return PHASES[self.phase]


class TileTable:
    """Rows to choose from. ValueError unless every launch finds one."""

    def __init__(self, rows: tuple[Tile, ...]) -> None:
        self.rows = rows
        self._picked: dict[tuple[str, str, int, int, int], Tile] = {}
        for op in OPERATIONS:
            for phase in PHASES:
                for bits in (16, 32):
                    if self._first(ANY, op, phase, bits, 1 << 62) is None:
                        raise ValueError(f"no tile of chip {ANY} for {op}, {phase}, {bits} bits")

    @classmethod
    def load(cls, path: Path = TABLE) -> TileTable:
        """The table in a JSON file; ValueError names the row that is wrong."""
        known = {field.name for field in fields(Tile)}
        rows: list[Tile] = []
        for number, row in enumerate(json.loads(path.read_text("utf-8"))):
            if set(row) != known:
                raise ValueError(f"{path.name}, row {number}: {set(row) ^ known} do not fit a tile")
            rows.append(Tile(**row))
        return cls(tuple(rows))

    @staticmethod
    def dump(rows: tuple[Tile, ...], path: Path = TABLE) -> None:
        """Write the rows as :meth:`load` reads them, one a line."""
        lines = [json.dumps({f.name: getattr(row, f.name) for f in fields(Tile)}) for row in rows]
        path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", "utf-8")

    def pick(self, chip: str, op: str, tokens: int, bits: int, width: int) -> Tile:
        """The first row for ``chip`` that fits, otherwise the first of chip ``any``.

        ``tokens`` is the size of the plan's tiles, which names the phase.
        """
        key = (chip, op, tokens, bits, width)
        if key not in self._picked:
            phase = "prefill" if tokens == PREFILL_TOKENS else "decode"
            found = self._first(chip, op, phase, bits, width)
            found = found or self._first(ANY, op, phase, bits, width)
            if found is None:
                raise ValueError(f"no tile for {op}, {phase}, {bits} bits, width {width}")
            self._picked[key] = found
        return self._picked[key]

    def _first(self, chip: str, op: str, phase: str, bits: int, width: int) -> Tile | None:
        for row in self.rows:
            same = (row.chip, row.op, row.phase, row.bits) == (chip, op, phase, bits)
            if same and (row.up_to == 0 or width <= row.up_to):
                return row
        return None
