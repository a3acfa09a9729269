"""The table of tiles: what is taken for which launch, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from manyhats_kernels.triton.plan import DECODE_TOKENS, PREFILL_TOKENS
from manyhats_kernels.triton.tiles import Tile, TileTable

ANY = TileTable.load().rows
DECODE = Tile("sm_90", "shrink", "decode", 16, 1024, 16, 64, 2, 4, 3)


def test_the_served_table_names_every_row_once():
    names = [row.name for row in ANY]
    assert len(set(names)) == len(names)


def test_the_first_row_that_fits_is_taken():
    wider = dataclasses.replace(DECODE, up_to=0, split=8)
    table = TileTable((DECODE, wider, *ANY))
    assert table.pick("sm_90", "shrink", DECODE_TOKENS, 16, 1024) is DECODE
    assert table.pick("sm_90", "shrink", DECODE_TOKENS, 16, 1025) is wider
    for other in (
        table.pick("sm_80", "shrink", DECODE_TOKENS, 16, 1024),
        table.pick("sm_90", "shrink", PREFILL_TOKENS, 16, 1024),
        table.pick("sm_90", "shrink", DECODE_TOKENS, 32, 1024),
        table.pick("sm_90", "expand", DECODE_TOKENS, 16, 1024),
    ):
        assert other in ANY


def test_a_chip_whose_rows_do_not_fit_takes_any():
    table = TileTable((DECODE, *ANY))
    assert table.pick("sm_90", "shrink", DECODE_TOKENS, 16, 4096).chip == "any"


def test_what_is_dumped_is_loaded(tmp_path):
    path = tmp_path / "tiles.json"
    TileTable.dump((DECODE, *ANY), path)
    assert TileTable.load(path).rows == (DECODE, *ANY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("op", "gather"),
        ("phase", "both"),
        ("bits", 8),
        ("ranks", 24),
        ("span", 100),
        ("split", 3),
        ("warps", 16),
        ("stages", 0),
        ("up_to", -1),
    ],
)
def test_a_tile_that_cannot_be_launched_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} of a tile must be"):
        dataclasses.replace(DECODE, **{field: value})


def test_an_expand_is_not_split():
    with pytest.raises(ValueError, match="split of an expand must be 1"):
        dataclasses.replace(DECODE, op="expand")


def test_a_table_with_a_gap_is_refused():
    with pytest.raises(ValueError, match="no tile of chip any for shrink, decode, 32 bits"):
        TileTable(tuple(r for r in ANY if (r.op, r.phase, r.bits) != ("shrink", "decode", 32)))


def test_a_row_with_another_field_is_refused(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([dataclasses.asdict(DECODE) | {"block": 3}]))
    with pytest.raises(ValueError, match=r"row 0: \{'block'\}"):
        TileTable.load(path)
