"""Secrets as files (of Docker or Kubernetes, say), in the place of variables: read at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def with_secret_files(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with what their files of secrets hold: keys a line, beside those given; one URL.

    Raises ValueError, which shows no secret, for a file that cannot be read or is empty, and for a
    URL beside another one.
    """
    for name in ("admin_api_keys", "api_keys", "redis_url"):
        source = given.get(f"{name}_file")
        if source is None:
            continue
        lines = _lines_of(f"{name}_file", Path(source))
        if name == "redis_url":
            if given.get(name) is not None or len(lines) != 1:
                raise ValueError("redis_url_file: one line, and no redis_url beside it")
            given = given | {name: lines[0]}
        else:
            there = given.get(name) or ()
            known = there.split(",") if isinstance(there, str) else there
            given = given | {name: (*filter(None, known), *lines)}
    return given


def _lines_of(name: str, path: Path) -> list[str]:
    """The lines of a file that hold something. Raises ValueError."""
    try:
        text = path.expanduser().read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name}: {path} cannot be read: {type(error).__name__}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{name}: {path} is empty")
    return lines
