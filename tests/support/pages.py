"""The commands of a page of documentation, run in order against a real server."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from manyhats import cli

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
_SET = re.compile(r"[A-Z_]+=")


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the indented blocks, comments left out."""
    found: list[list[str]] = []
    for block in _BLOCK.findall(page.read_text("utf-8")):
        text = ""
        for line in block.splitlines():
            text += line.removeprefix("    ") + "\n"
            joined = text.replace("\\\n", " ")
            try:
                words = shlex.split(joined, comments=True)
            except ValueError:  # a quotation that goes on in the next line
                continue
            if text.endswith("\\\n"):
                continue
            found += [words] if words else []
            text = ""
        assert not text.strip(), f"{page.name}: {text!r} does not end"
    return found


@dataclass
class Reader:
    """Types what a page says.

    ``instead``: what stands for what, in every word; ``extra``: words added to a script;
    ``environment`` is told of exports. ``served_by`` grows with the header of each answer to a
    generation, ``output`` with what each command of ``manyhats`` prints.
    """

    url: str
    instead: Mapping[str, str]
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)
    environment: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)
    served_by: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)

    def read(self, page: Path) -> list[str]:
        """Runs every command of the page; each must succeed. Gives their first words."""
        ran = []
        for words in commands(page):
            plain = [self._word(word) for word in words]
            while _SET.match(plain[0]):  # as for `serve`, which is only parsed
                plain = plain[1:]
            if plain[0] == "export":
                name, _, value = plain[1].partition("=")
                self.environment.setenv(name, value)
                continue
            kind = Path(plain[0]).name
            runs: dict[str, Callable[[list[str]], None]] = {
                "manyhats": self._manyhats,
                "curl": self._curl,
                "python": self._python,
                "make": _target,
                "pip": _pinned,
            }
            runs[kind](plain[1:])
            ran.append(kind)
        return ran

    def _word(self, word: str) -> str:
        for said, meant in self.instead.items():
            word = word.replace(said, meant)
        return word

    def _manyhats(self, words: list[str]) -> None:
        if words[0] == "serve":
            command = typer.main.get_command(cli.app).commands["serve"]
            assert command.make_context("serve", words[1:]).params
            return
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, (words, result.output, result.exception)
        self.output.append(result.output)

    def _python(self, words: list[str]) -> None:
        script = ROOT / words[0]
        sys.path.insert(0, str(script.parent))
        try:
            main = importlib.import_module(script.stem).main
        finally:
            sys.path.remove(str(script.parent))
        assert main([*words[1:], *self.extra.get(script.name, ())]) in (0, None), words

    def _curl(self, words: list[str]) -> None:
        method, url, headers, body = "GET", "", {}, None
        rest = iter(words)
        for word in rest:
            if word == "-H":
                name, _, value = next(rest).partition(": ")
                headers[name] = value
            elif word == "-d":
                body = next(rest)
                json.loads(body)
                method = "POST" if method == "GET" else method
            elif word == "-X":
                method = next(rest)
            elif word != "-s":
                url = word
        answer = httpx.request(method, url, headers=headers, content=body, timeout=120)
        assert answer.is_success, (words, answer.text)
        if "x-manyhats-served-by" in answer.headers:
            self.served_by.append(answer.headers["x-manyhats-served-by"])


def _target(words: list[str]) -> None:
    [target] = words
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def _pinned(words: list[str]) -> None:
    """What a page installs is what the tests have."""
    assert words[0] == "install"
    assert all(f'"{word}"' in (ROOT / "pyproject.toml").read_text("utf-8") for word in words[1:])
