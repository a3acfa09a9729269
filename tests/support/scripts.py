"""Executables that stand in for a machine's own tools."""

from __future__ import annotations

import stat
from pathlib import Path

FAILING_CC = '[ "$1" = --version ] && exit 0\necho "cannot make vectors" >&2; exit 3'
"""A C compiler that says its version and compiles nothing."""


def script(path: Path, text: str) -> str:
    """The path of a shell script with that text, executable."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
