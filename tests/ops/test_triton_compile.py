"""Every Triton kernel compiles ahead of time with every tile, and the document says to what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import triton

from manyhats_kernels.triton.tiles import TileTable


@pytest.fixture(scope="module")
def rows(repository, tmp_path_factory):
    """The report, made in a process without the interpreter, and nothing cached from before."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, repository / "loadtests" / "kernels" / "compile_report.py", "--json"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_tile_compiles_for_both_chips(rows):
    for tile in TileTable.load().rows:
        targets = {row["target"] for row in rows if row["kernel"].endswith(tile.name)}
        assert targets == ({80, 90} if tile.chip == "any" else {int(tile.chip[3:])}), tile.name


def test_nothing_spills_and_all_shared_memory_is_there(rows):
    """By the limits of the CUDA programming guide; one that any chip takes must fit sm_86 too."""
    for row in rows:
        assert row["stack"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared"] <= {80: 163, 90: 227}[row["target"]] * 1024, row
        assert not row["kernel"].endswith("any") or row["shared"] <= 99 * 1024, row


def test_the_document_is_current(rows, repository):
    """Names always; figures when it was written with the triton that is here."""
    text = (repository / "docs" / "kernels.md").read_text("utf-8")
    table = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in text.splitlines()
        if re.match(r"\| \S+ \| sm_\d+ \|", line)
    ]
    assert {line[:2] for line in table} == {(r["kernel"], f"sm_{r['target']}") for r in rows}
    if f"with triton {triton.__version__}." in text:
        figures = [
            tuple(str(r[k]) for k in ("kernel", "warps", "registers", "stack", "shared"))
            for r in rows
        ]
        assert [(line[0], *line[2:]) for line in table] == figures
