"""A real Prometheus: its binaries, a server of our own on loopback, and what it answers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.polling import until

from manyhats.config import Settings


def tool(name: str) -> str:
    """``prometheus`` or ``promtool``: the machine's own, or the one that `make test` fetched."""
    kept = Settings().home / "tools" / name
    found = shutil.which(name) or (str(kept) if kept.exists() else None)
    if found is None:
        pytest.fail(
            f"no {name}: `make test` fetches it, as does `deploy/prometheus/fetch-tools "
            f"{kept.parent}` (Debian's package), or put one on PATH",
            pytrace=False,
        )
    return found


@dataclass
class Prometheus:
    """A running one."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector (or scalar) of an expression. Fails where it does not parse."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        body = answer.json()
        assert body["status"] == "success", (expression, body)
        return body["data"]["result"]

    def get(self, path: str) -> Any:
        """The data of an API route."""
        return httpx.get(f"{self.url}/api/v1/{path}", timeout=30).raise_for_status().json()["data"]


@contextmanager
def running_prometheus(arguments: Sequence[str], port: int, log: Path) -> Iterator[Prometheus]:
    """``prometheus`` with these arguments on a loopback port, once it is ready."""
    listen = f"--web.listen-address=127.0.0.1:{port}"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [tool("prometheus"), *arguments, listen], stdout=sink, stderr=subprocess.STDOUT
        )
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until(lambda: process.poll() is not None or _ready(server.url), told=log.read_text)
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
