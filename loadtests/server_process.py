"""The processes under test: a Manyhats server on a free port, and workers of the local peers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
from bench_http import Address, Connection, ProtocolError
from tqdm import tqdm


class ServerError(RuntimeError):
    """The server did not start, did not become ready, or refused an adapter."""


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def register(base_url: str, folders: Sequence[Path]) -> None:
    """Registers each folder under its own name through /v1/load_lora_adapter.

    Raises ServerError.
    """
    connection = Connection(Address.parse(base_url))
    for folder in tqdm(folders, desc="registering", unit="adapter"):
        body = orjson.dumps({"lora_name": folder.name, "lora_path": str(folder.resolve())})
        response = await connection.request("POST", "/v1/load_lora_adapter", body)
        content = await connection.read_all()
        if response.status != 200:
            raise ServerError(
                f"{folder.name}: HTTP {response.status}: {content.decode(errors='replace')}"
            )
    await connection.close()


async def answering(
    process: subprocess.Popen[bytes],
    base_url: str,
    path: str,
    started: float,
    timeout_s: float,
    words: Callable[[], str],
    *,
    poll_s: float = 0.1,
) -> float:
    """Polls a process's ``path`` until it answers 200; seconds since ``started`` (monotonic).

    Raises ServerError, with the ``words`` of its log, where the process ends first or time is up.
    """
    address = Address.parse(base_url)
    while time.monotonic() - started < timeout_s:
        if process.poll() is not None:
            raise ServerError(f"server ended with {process.returncode}:\n{words()}")
        connection = Connection(address)
        try:
            response = await connection.request("GET", path)
            await connection.read_all()
            if response.status == 200:
                return time.monotonic() - started
        except (OSError, ProtocolError):
            pass  # not listening yet
        finally:
            await connection.close()
        await asyncio.sleep(poll_s)
    raise ServerError(f"server not ready after {timeout_s:.0f} s:\n{words()}")


class ServerProcess:
    """One ``manyhats serve`` on a free port.

    ``flags`` are added to its command line; its output goes to ``log``.
    """

    def __init__(self, flags: Sequence[str], log: Path) -> None:
        port = free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        self.log = log
        self.command = [
            sys.executable,
            "-m",
            "manyhats",
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *flags,
        ]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    async def wait_ready(self, timeout_s: float = 300.0) -> float:
        """Polls /readyz until it answers 200; returns the seconds that took. Raises ServerError."""
        begun, where = time.monotonic(), (self.base_url, "/readyz")
        return await answering(self._process, *where, begun, timeout_s, self._tail, poll_s=0.25)

    async def register(self, folders: Sequence[Path]) -> None:
        """Registers each folder under its own name. Raises ServerError."""
        await register(self.base_url, folders)

    def peak_mib(self) -> float:
        """The process's largest resident set so far, MiB (Linux; nan elsewhere)."""
        status = Path(f"/proc/{self._process.pid}/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        return float("nan")

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far, user and system (Linux; nan elsewhere)."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return float("nan")
        fields = stat.read_text().rpartition(")")[2].split()  # the name may hold spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if it has not ended after a minute."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


class LocalPeer:
    """A ``peers_local.py`` worker: loads once, then runs one timed batch a call.

    ``python``: the interpreter of the environment that has the libraries.
    """

    def __init__(self, flags: Sequence[str], log: Path, python: str = sys.executable) -> None:
        self.command = [python, str(Path(__file__).with_name("peers_local.py")), *flags]
        with log.open("wb") as err:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
            )
        self._log = log
        self._read()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def batch(self, size: int | None = None) -> dict[str, float]:
        """One timed batch (of ``size`` from here on): what ``peers_local.figures`` returns.

        Raises ServerError when the worker died.
        """
        if self._process.stdin is None:
            raise ServerError("the worker has no stdin")
        self._process.stdin.write("go\n" if size is None else f"{size}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        if self._process.stdout is None:
            raise ServerError("the worker has no stdout")
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise ServerError(f"{' '.join(self.command[:6])} ... ended:\n{tail}")
        value: dict[str, float] = orjson.loads(line)
        return value

    def stop(self) -> None:
        """Closes its stdin, which ends it."""
        self._process.communicate(timeout=60)
