"""The compose file and the Dockerfile as data: what would run, with which words and variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def variables(text: str) -> dict[str, str]:
    """Every ``${NAME:-default}`` of the compose file."""
    return dict(_VARIABLE.findall(text))


def compose(repository: Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The compose file with its variables replaced, as ``docker compose config`` does."""
    text = (repository / "docker-compose.yml").read_text("utf-8")
    given = env or {}
    return yaml.safe_load(_VARIABLE.sub(lambda m: given.get(m[1]) or m[2], text))


def dotenv(text: str) -> dict[str, str]:
    """The variables of a ``.env`` file."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    joined = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    lines = (line.strip() for line in joined.splitlines() if line.strip())
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def stages(dockerfile: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name to (what it is from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            found[name] = (source, [])
        elif found:
            found[name][1].append((word, rest))
    return found


def image_environment(dockerfile: str, target: str) -> dict[str, str]:
    """The ENV of a stage and of those that it is from."""
    all_stages, env, name = stages(dockerfile), {}, target
    while name in all_stages:
        source, lines = all_stages[name]
        pairs = [p for word, rest in lines if word == "ENV" for p in rest.split()]
        env = dict(p.split("=", 1) for p in pairs) | env
        name = source
    return env
