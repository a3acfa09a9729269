"""Every kernel compiles for every chip that is served, keeps its values in registers and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.aot import CHIPS

MAX_REGISTERS = 255


@pytest.mark.parametrize("cases", ["support.aot_4bit:cases", "support.aot_attention:cases"])
def test_compiles_without_spills(cases):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "support.aot", cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["chip"] for r in reports} == set(CHIPS)
    for one in reports:
        assert one["spilled"] == 0, one
        assert one["registers"] <= MAX_REGISTERS, one
        assert one["shared"] <= one["shared_limit"], one
        if "matmul" in one["name"] and "fp32" not in one["name"]:
            assert one["tensor_cores"], one
