"""Environments of the peers, outside the project's own: made step by step, kept, resumed.

A recipe is a list of steps; each one that has ended is noted in the peer's folder, so that a run
that was cut short goes on where it stopped, and one that is whole costs nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

STATE = "installed.json"


class UnavailableError(Exception):
    """A peer cannot be installed or started here; the message is the reason, in one line."""


def last_words(log: Path) -> str:
    """The last line of a log that says anything, at most 200 characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line and not line.startswith(("hint:", "WARNING:"))]
    # pip's and Python's errors come before their backtraces' and advice's ends.
    errors = [line for line in said if line.upper().startswith("ERROR")]
    return (errors or said or ["(no output)"])[-1][:200]


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs a step's commands in the peer's ``folder``; what they print goes to ``log``."""

    folder: Path
    log: Path

    @property
    def python(self) -> str:
        """The interpreter of the peer's own environment."""
        return str(self.folder / "venv" / "bin" / "python")

    def run(self, *argv: str, env: Mapping[str, str] | None = None) -> None:
        """Runs one command to its end. Raises UnavailableError where it fails or is not there."""
        with self.log.open("a", encoding="utf-8") as out:
            print("$", *argv, file=out, flush=True)
            try:
                done = subprocess.run(
                    argv, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out,
                    stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, check=False,
                )  # fmt: skip
            except OSError as error:
                raise UnavailableError(f"{argv[0]}: {error.strerror}") from error
        if done.returncode:
            said = last_words(self.log)
            raise UnavailableError(f"`{' '.join(argv)[:80]}` ended with {done.returncode}: {said}")

    def pip(self, *args: str) -> None:
        """pip of the peer's own environment. Raises UnavailableError."""
        self.run(self.python, "-m", "pip", "--disable-pip-version-check", *args)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its title, and what it does. Done twice it must leave what once leaves."""

    title: str
    do: Callable[[Shell], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a peer is installed. ``version`` names all that is pinned: when it changes, the steps are
    done again. ``check`` raises UnavailableError for a machine that cannot have the peer.
    """

    name: str
    version: str
    steps: Sequence[Step]
    check: Callable[[], None] = field(default=lambda: None)


def install(recipe: Recipe, folder: Path, *, progress: bool = True) -> None:
    """Does the steps that are not done yet. Raises UnavailableError with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / STATE
    done = _done(state, recipe)
    left = [step for step in recipe.steps if step.title not in done]
    if not left:
        return
    recipe.check()
    shell = Shell(folder, folder / "install.log")
    with tqdm(left, desc=f"installing {recipe.name}", unit="step", disable=not progress) as bar:
        for step in bar:
            bar.set_postfix_str(step.title)
            step.do(shell)
            done.append(step.title)
            made = {"version": recipe.version, "done": done}
            state.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _done(state: Path, recipe: Recipe) -> list[str]:
    if not state.exists():
        return []
    kept = json.loads(state.read_text(encoding="utf-8"))
    return list(kept["done"]) if kept["version"] == recipe.version else []


def make_venv(shell: Shell) -> None:
    """The peer's own Python environment, of the interpreter that runs this."""
    if not Path(shell.python).exists():
        shell.run(sys.executable, "-m", "venv", "venv")


def pins(name: str) -> Path:
    """The file of pinned versions of one peer."""
    return Path(__file__).resolve().with_name("pins") / f"{name}.txt"
