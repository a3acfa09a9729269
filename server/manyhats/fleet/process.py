"""A ``manyhats serve`` of one's own, in a process that never outlives its owner."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from manyhats.errors import ServiceError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2


class EngineGoneError(ServiceError):
    """The server's process does not answer, or not any more."""


class NoReplicaError(ServiceError):
    """No replica answered a request, or it may not be sent to a second one."""


class EngineProcess:
    """The server on a free loopback port; ``flags`` are those of ``manyhats serve``.

    On Linux the kernel ends it with the process that started it, however that ends.
    """

    def __init__(self, flags: Sequence[str], *, log: Path | None = None) -> None:
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        self._command = [*_tether(), sys.executable, "-m", "manyhats", "serve"]
        self._command += ["--host", "127.0.0.1", "--port", str(port), *flags]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._stopping = False
        self._on_death: Callable[[], None] | None = None
        started = threading.Event()
        # The kernel's signal comes with the end of the thread that forked, so this one stays.
        threading.Thread(target=self._run, args=(started,), name="engine", daemon=True).start()
        started.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's id."""
        if self._process is None:
            raise EngineGoneError("the server was never started")
        return self._process.pid

    def wait_ready(self, timeout_s: float) -> None:
        """Returns once /readyz is 200. Raises EngineGoneError where the process ends before that,
        or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        with httpx.Client(base_url=self.base_url, timeout=5.0) as client:
            while time.monotonic() < deadline:
                if not self.alive:
                    raise EngineGoneError("the server ended before it was ready; see its log")
                try:
                    if client.get("/readyz").status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                time.sleep(_POLL_S)
        raise EngineGoneError(f"the server was not ready after {timeout_s:g} s")

    def when_it_dies(self, then: Callable[[], None]) -> None:
        """Calls ``then``, on a thread, when the process ends without ``stop``; now, if it has."""
        self._on_death = then
        if not self.alive:
            then()

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, on which the server drains; SIGKILL after ``timeout_s``."""
        self._stopping = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("the server did not end within %g s and is killed", timeout_s)
            process.kill()
            process.wait()

    def _run(self, started: threading.Event) -> None:
        try:
            with ExitStack() as stack:
                out = None if self._log is None else stack.enter_context(self._log.open("ab"))
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=None if out is None else subprocess.STDOUT,
                )
        except OSError as error:
            self._failure = error
            return
        finally:
            started.set()
        self._process.wait()
        if self._on_death is not None and not self._stopping:
            self._on_death()


def _tether() -> list[str]:
    """What to put before a command so that it dies with the thread that starts it.

    The new process asks for it itself and becomes the command: a ``preexec_fn`` would fork a
    process that may have gRPC's threads in it.
    """
    if not sys.platform.startswith("linux"):
        return []
    ask = f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {signal.SIGKILL.value})"
    become = "os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", f"import ctypes, os, sys; {ask}; {become}"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
