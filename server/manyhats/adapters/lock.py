"""One process owns a folder: a lock that the kernel releases however the process dies."""

from __future__ import annotations

import fcntl
import os
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
