"""Locks on files, which the kernel releases however a process dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manyhats.errors import ConfigError


class FileLock:
    """An exclusive lock on ``path`` (created where absent, never removed), held from construction
    to ``release``.

    Raises ConfigError where somebody else, this process included, holds it already.
    """

    def __init__(self, path: Path) -> None:
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self.release()
            raise ConfigError(
                f"{path.parent} is in use by another server; give this one its own folder (--home)"
            ) from exc

    def release(self) -> None:
        """Give the folder up. Calling it again does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextmanager
def locked(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Wait for a lock on ``path`` (created where absent) and hold it while the block runs.

    Any number may hold it that are not ``exclusive``, of any process and thread. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def try_lock(path: Path) -> int | None:
    """A descriptor that holds ``path`` exclusively until it is closed; None where somebody does.

    Raises FileNotFoundError where there is no such file, OSError.
    """
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
