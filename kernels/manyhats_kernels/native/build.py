"""Compile the C kernels for this very machine, once, and load them.

The library's file name carries the SHA-256 of everything that decides its content (sources, flags,
the compiler's version, the processor's features), so that versions and machines may share a folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from manyhats_kernels.backend import BackendUnavailableError

ENTRY = "kernels.c"
FLAGS = (
    *("-std=gnu11", "-O3", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"),
    # errno and traps only: NaN and infinity keep their meaning
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
TIMEOUT_S = 300


def build(compiler: str | None, cache_dir: Path) -> Path:
    """The path of the compiled library in ``cache_dir``, made with ``compiler`` unless it is there.

    Another process may build the same file at the same time: each writes its own and renames it
    into place. Raises :class:`BackendUnavailableError`, with the compiler's words, when there is no
    compiler, when it fails, or when ``cache_dir`` cannot be written.
    """
    if compiler is None:
        raise BackendUnavailableError(
            "the native backend needs a C compiler: no cc was found on PATH"
        )
    source = Path(__file__).parent
    flags = (*FLAGS, *_machine_flags())
    digest = hashlib.sha256()
    parts = [path.read_bytes() for path in sorted(source.glob("*.[ch]"))]
    parts += [" ".join(flags).encode(), _version(compiler).encode(), _features().encode()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    target = cache_dir / f"manyhats-kernels-{digest.hexdigest()[:32]}.so"
    if target.exists():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="build-") as folder:
            made = Path(folder) / "kernels.so"
            _run([compiler, *flags, str(source / ENTRY), "-o", str(made), "-lm"])
            os.replace(made, target)  # noqa: PTH105  Path.replace is the same call
    except OSError as error:
        raise BackendUnavailableError(f"cannot keep native code in {cache_dir}: {error}") from error
    return target


def load(path: Path) -> ctypes.CDLL:
    """The library at ``path``; BackendUnavailableError when the loader refuses it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(f"cannot load the native kernels: {error}") from error


def _machine_flags() -> tuple[str, ...]:
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return ("-march=native",) if x86 else ("-mcpu=native",)


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _features() -> str:
    """What tells one processor from another: the kernel's list of features, where it has one."""
    info = Path("/proc/cpuinfo")
    names = ("flags", "Features", "model name", "CPU part")
    lines = info.read_text().splitlines() if info.exists() else []
    own = sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in names})
    return "\n".join([platform.machine(), platform.processor(), *own])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(
            f"the C compiler {command[0]} did not run: {error}"
        ) from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise BackendUnavailableError(
            f"the C compiler {command[0]} failed with status {done.returncode}: {words[-2000:]}"
        )
    return done.stdout
