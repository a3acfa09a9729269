"""The server's process: never without its owner, and a start that fails is told at once."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manyhats.fleet.process import EngineGoneError, EngineProcess

OWNER = """
import subprocess, sys, threading
from manyhats.fleet.process import _tether
child = [sys.executable, "-c", "print('up', flush=True); import signal; signal.pause()"]
def keep():
    subprocess.Popen([*_tether(), *child]).wait()
threading.Thread(target=keep, daemon=True).start()
threading.Event().wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal is Linux'")
def test_a_server_dies_with_its_owner_also_by_kill_9() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"up\n"
    os.kill(owner.pid, signal.SIGKILL)
    assert owner.stdout.read() == b"", "ends only when the child, which holds the pipe too, is gone"
    assert owner.wait() == -signal.SIGKILL
    owner.stdout.close()


def test_a_server_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    process = EngineProcess(["--slots", "none"], log=tmp_path / "log")
    with pytest.raises(EngineGoneError, match="ended before it was ready"):
        process.wait_ready(300)
    assert not process.alive
    assert "--slots" in (tmp_path / "log").read_text()
    told = threading.Event()
    process.when_it_dies(told.set)
    assert told.is_set()
    process.stop(1)


def test_the_owner_is_told_of_a_death_and_not_of_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = "import signal; signal.pause()"
    monkeypatch.setattr(
        "manyhats.fleet.process._tether", lambda: [sys.executable, "-c", waiting]
    )  # the rest of the command is this one's arguments
    told = threading.Event()
    process = EngineProcess([])
    process.when_it_dies(told.set)
    assert process.alive
    assert not told.is_set()
    os.kill(process.pid, signal.SIGKILL)
    assert told.wait(30)
    stopped, silent = EngineProcess([]), threading.Event()
    stopped.when_it_dies(silent.set)
    stopped.stop(30)
    assert not stopped.alive
    for thread in [t for t in threading.enumerate() if t.name == "engine"]:
        thread.join(30)
    assert not silent.is_set()


def test_the_error_comes_through_to_other_processes() -> None:
    error = pickle.loads(pickle.dumps(EngineGoneError("gone")))
    assert (type(error), error.message, error.status) == (EngineGoneError, "gone", 503)
