"""Compiles Triton kernels ahead of time, on any machine, and reads what the compiler says of them.

Run as a script in a process of its own (Triton's interpreter, once switched on, cannot compile):
it reads the name of a function ``module:name`` that lists :class:`Case`, and writes a JSON line a
case and chip.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHIPS = {"sm_80": 163 << 10, "sm_90": 227 << 10}
"""Shared memory that one block may have on each chip (CUDA C programming guide, table of compute
capabilities)."""


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel.

    ``arguments``: type or constant by name, in any order; a string that starts with ``*`` is a
    pointer (aligned to 16 bytes), ``i32``, ``i32:16`` (a multiple of 16) and ``fp32`` are scalars,
    anything else (None too) is a constant.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 3
    fusion: bool = True


def _is_type(value: object) -> bool:
    return isinstance(value, str) and (value.startswith("*") or value in ("i32", "i32:16", "fp32"))


def report(case: Case, chip: str) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of the case on the chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    if set(names) != set(case.arguments):
        raise ValueError(f"{case.name}: {sorted(set(names) ^ set(case.arguments))} do not fit")
    typed = {n: v for n, v in case.arguments.items() if _is_type(v)}
    constants = {n: v for n, v in case.arguments.items() if not _is_type(v)}
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in typed and (typed[n].startswith("*") or typed[n].endswith(":16"))
    }
    source = ASTSource(
        fn=case.kernel,
        signature={n: typed[n].split(":")[0] if n in typed else "constexpr" for n in names},
        constexprs=constants,
        attrs=hints,
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", int(chip[3:]), 32),
        options={
            "num_warps": case.warps,
            "num_stages": case.stages,
            "enable_fp_fusion": case.fusion,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        text = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "name": case.name,
        "chip": chip,
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": made.metadata.shared,
        "shared_limit": CHIPS[chip],
        "tensor_cores": bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)", made.asm["ptx"])),
    }


def main() -> None:
    """Report on every case of the function named by the argument, on every chip."""
    module, _, function = sys.argv[1].partition(":")
    for case in getattr(importlib.import_module(module), function)():
        for chip in CHIPS:
            sys.stdout.write(json.dumps(report(case, chip)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
