"""The real server as a process of its own, as `manyhats serve` starts it, and what a client needs
of it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.polling import PATIENCE_S

from manyhats.config import Settings

_ADDRESS = re.compile(r" at (http://\S+)$", re.MULTILINE)


@dataclass
class Server:
    """A running server. ``output`` grows with what it writes."""

    process: subprocess.Popen[str]
    base_url: str
    output: list[str]

    def get(self, path: str, **more: Any) -> httpx.Response:
        """GET on a connection of its own, with patience for a busy machine."""
        return httpx.get(f"{self.base_url}{path}", timeout=PATIENCE_S, **more)

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample of /metrics by (name, sorted labels)."""
        text = self.get("/metrics").raise_for_status().text
        return {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 where it does not exist."""
        return self.metrics().get((name, tuple(sorted(labels.items()))), 0.0)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of a name whose labels include ``labels``."""
        wanted = set(labels.items())
        return sum(
            v for (n, have), v in self.metrics().items() if n == name and wanted <= set(have)
        )

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Ends the process by signal and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout)


@contextmanager
def running_server(home: Path, *flags: str, timeout: float = 400.0) -> Iterator[Server]:
    """``python -m manyhats serve`` on a free port, once it answers; ended by SIGTERM afterwards."""
    share_caches(home)
    command = [
        sys.executable,
        "-m",
        "manyhats",
        "serve",
        "--port",
        "0",
        "--home",
        str(home),
        *flags,
    ]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with running_command(command, env, timeout=timeout) as server:
        yield server


def share_caches(home: Path) -> None:
    """Gives a home what every other one would make again: compiled kernels and quantized bases,
    both named by what they were made of. A compiler takes ten seconds, quantizing as long.
    """
    for name in ("kernels", "quantized"):
        shared = Settings().home / name
        shared.mkdir(parents=True, exist_ok=True)
        if not (home / name).exists():
            home.mkdir(parents=True, exist_ok=True)
            (home / name).symlink_to(shared, target_is_directory=True)


@contextmanager
def running_command(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: Path | None = None,
    timeout: float = 400.0,
) -> Iterator[Server]:
    """A command that serves, with that environment and no other, once it answers."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        cwd=cwd,
    )
    output: list[str] = []
    found = threading.Event()

    def read() -> None:
        for line in process.stdout:
            output.append(line)
            if line.strip() == "Try:":
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        found.wait(timeout)
        match = _ADDRESS.search("".join(output))
        assert match, f"the server did not come up:\n{''.join(output)}"
        yield Server(process, match[1], output)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(10)
        process.stdout.close()


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def demo_flags(repository: Path) -> Sequence[str]:
    """Registers the demo adapters."""
    return ("--adapter-root", str(repository / "examples" / "adapters"), "--register-roots")
