"""Planted bugs do not go unnoticed."""

from __future__ import annotations

import subprocess
import sys

BUGS = (
    "last K column dropped",
    "ragged tail dropped",
    "base rows given slot 0",
    "last slot never computed",
    "long segments cut",
    "16-bit accumulation",
    "scale applied twice",
    "another slot's rows read",
)


def test_every_planted_bug_is_caught(repository):
    """In a process of its own, so that no patched module is left in this one."""
    done = subprocess.run(
        [sys.executable, repository / "tests" / "ops" / "mutate.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    caught = [line for line in done.stdout.splitlines() if line.startswith("caught: ")]
    for bug in BUGS:
        assert any(line.startswith(f"caught: {bug} by ") for line in caught), bug
