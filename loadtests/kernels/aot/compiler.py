"""Compiles a Triton kernel ahead of time, on any machine, and reads what the compiler says of it.

Registers and stack are read from the cubin, shared memory from Triton's metadata, the use of tensor
cores from the PTX. A stack is where registers are spilled to.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from manyhats_kernels.triton.tiles import ANY

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block can have (CUDA C Programming Guide)."""

SMALLEST_SHARED_LIMIT = 99 * 1024
"""The same on sm_86 and sm_89, for kernels that any chip from sm_80 on takes."""

_TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async)")


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel.

    ``arguments``: type or constant by name, in any order; a string that starts with ``*`` is a
    pointer (aligned to 16 bytes), ``i32``, ``i32:16`` (a multiple of 16) and ``fp32`` are scalars,
    anything else (None too) is a constant. ``chip`` is the only one to take it (``sm_90``), or ANY;
    ``tensor_cores`` says that its products have to run there.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 3
    fusion: bool = True
    chip: str = ANY
    tensor_cores: bool = False

    def targets(self) -> list[int]:
        """The compute capabilities, times ten, to compile it for."""
        return [target for target in SHARED_LIMIT if self.chip in (ANY, f"sm_{target}")]


@dataclass(frozen=True)
class Row:
    """What one case compiled to for one target; ``problem`` is empty where nothing is wrong."""

    kernel: str
    target: int
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_cores: bool
    problem: str


def compiled(case: Case, target: int) -> Row:
    """Compile for ``sm_<target>`` and read the report.

    ValueError when the case's arguments are not the kernel's.
    """
    result = triton.compile(
        _source(case),
        target=GPUTarget("cuda", target, 32),
        options={
            "num_warps": case.warps,
            "num_stages": case.stages,
            "enable_fp_fusion": case.fusion,
        },
    )
    used = _resources(result.asm["cubin"])
    stack, shared = used["STACK"] + used["LOCAL"], result.metadata.shared
    tensor_cores = bool(_TENSOR_CORES.search(result.asm["ptx"]))
    return Row(
        kernel=case.name,
        target=target,
        warps=case.warps,
        registers=used["REG"],
        stack=stack,
        shared=shared,
        tensor_cores=tensor_cores,
        problem=_problem(case, target, stack, shared, tensor_cores),
    )


def _problem(case: Case, target: int, stack: int, shared: int, tensor_cores: bool) -> str:
    limit = SHARED_LIMIT[target]
    if case.chip == ANY:
        limit = min(limit, SMALLEST_SHARED_LIMIT)
    if stack:
        return f"{case.name} on sm_{target} spills: a stack of {stack} bytes"
    if shared > limit:
        return f"{case.name} on sm_{target} wants {shared} of {limit} bytes shared"
    if case.tensor_cores and not tensor_cores:
        return f"{case.name} on sm_{target} multiplies without tensor cores"
    return ""


def _is_type(value: object) -> bool:
    return isinstance(value, str) and (value.startswith("*") or value in ("i32", "i32:16", "fp32"))


def _source(case: Case) -> ASTSource:
    names = case.kernel.arg_names
    if set(names) != set(case.arguments):
        raise ValueError(f"{case.name}: {sorted(set(names) ^ set(case.arguments))} do not fit")
    typed = {n: v for n, v in case.arguments.items() if _is_type(v)}
    return ASTSource(
        fn=case.kernel,
        signature={n: typed[n].partition(":")[0] if n in typed else "constexpr" for n in names},
        constexprs={n: v for n, v in case.arguments.items() if n not in typed},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n in typed and (typed[n].startswith("*") or typed[n].endswith(":16"))
        },
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the only kernel in a cubin, from NVIDIA's cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        told = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
