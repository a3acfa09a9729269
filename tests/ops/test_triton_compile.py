"""Every Triton kernel compiles ahead of time with every tile, and the document says to what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import triton

from manyhats_kernels.triton.attention import ATTENTION_TILES
from manyhats_kernels.triton.quant import MATMUL_TILES
from manyhats_kernels.triton.tiles import TileTable

BOTH = {80, 90}


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


def targets(rows, pattern):
    return {row["target"] for row in rows if re.search(pattern, row["kernel"])}


def test_every_tile_compiles_for_both_chips(rows):
    for tile in TileTable.load().rows:
        wanted = BOTH if tile.chip == "any" else {int(tile.chip[3:])}
        assert targets(rows, rf"(^|-){tile.name}$") == wanted, tile.name
    for tile in MATMUL_TILES:
        dtype = "bf16" if tile.bits == 16 else "fp32"
        kernel = rf"^matmul4-t{tile.block_t}-k{tile.block_k}-{dtype}-nested-expand\d+-split$"
        assert targets(rows, kernel) == BOTH, tile
    for tile in ATTENTION_TILES:
        dtype = "bf16" if tile.bits == 16 else "fp32"
        for phase in ("prefill", "decode"):
            kernel = rf"^attention-{phase}-head{tile.head}-{dtype}-window-cap$"
            assert targets(rows, kernel) == BOTH, tile


def test_nothing_spills_and_all_shared_memory_is_there(rows):
    """By the limits of the CUDA programming guide; one that any chip takes must fit sm_86 too."""
    for row in rows:
        assert row["stack"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared"] <= {80: 163, 90: 227}[row["target"]] * 1024, row
        one_chip = re.search(r"-sm_\d+$", row["kernel"])
        assert one_chip or row["shared"] <= 99 * 1024, row


def test_products_of_16_bit_values_run_on_tensor_cores(rows):
    products = re.compile(r"^(matmul4|expand4|attention-(prefill|decode))-.*(bf|fp)16|-16bit-")
    found = [row for row in rows if products.search(row["kernel"])]
    assert len(found) > 30
    assert [row["kernel"] for row in found if not row["tensor_cores"]] == []


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
            (
                *(str(r[k]) for k in ("kernel", "warps", "registers", "stack", "shared")),
                "yes" if r["tensor_cores"] else "no",
            )
            for r in rows
        ]
        assert [(line[0], *line[2:]) for line in table] == figures
