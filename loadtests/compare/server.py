"""A server under test as a process: its start, its memory, its end. Any of the targets'."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
from compare.environments import UnavailableError, last_words
from compare.target import Launch
from server_process import answering

MIB = 1 << 20


def memory_mib(pid: int) -> float:
    """Memory of a process and its children, MiB: what they share is counted once (PSS)."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return float("nan")
    total = 0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended meanwhile, and holds nothing
    return total / MIB


class PeerServer:
    """One running server; ``base_url`` is where it listens. Its output goes to ``log``.

    Raises UnavailableError where the program is not there.
    """

    def __init__(self, launch: Launch, port: int, log: Path) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        try:
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    launch.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    env={**os.environ, **launch.env}, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise UnavailableError(f"{launch.argv[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """The process's id; its children are of the same group."""
        return self._process.pid

    async def wait_ready(self, path: str, timeout_s: float) -> float:
        """Polls ``path`` until it answers 200; seconds since the process was started.

        Raises ServerError.
        """
        return await answering(
            self._process, self.base_url, path, self._started, timeout_s,
            lambda: last_words(self.log),
        )  # fmt: skip

    def memory_mib(self) -> float:
        """See ``memory_mib``."""
        return memory_mib(self.pid)

    def stop(self, patience_s: float = 60.0) -> None:
        """SIGTERM to the server, and SIGKILL to all its processes that are left after a while."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):  # killed below
                self._process.wait(patience_s)
        with suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
