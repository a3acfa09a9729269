"""An adapter's folder as a compilation reads it: each file once, whole, into memory of our own.

What comes out of the store must be what its digest says. The SHA-256 of a file takes longer than
all the rest of a load, so it is computed on a thread of its own, of the very bytes that are worked
on meanwhile; whoever keeps or passes on anything made of them calls ``check`` before that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from queue import SimpleQueue

from manyhats.adapters.files import read_file
from manyhats.errors import AdapterLoadError
from manyhats.types import Digest


class AdapterFolder:
    """A folder of which nothing is known beforehand: one that is being registered.

    ``accepted``: its content has been compiled before, if ``check`` finds that it is what it was.
    """

    accepted = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, max_bytes: int) -> memoryview:
        """The file ``name``, of at most ``max_bytes``. Raises what ``read_file`` raises."""
        return read_file(self.path / name, max_bytes)

    def check(self) -> None:
        """Raises AdapterLoadError unless what was read is what it should be."""


class StoredFolder(AdapterFolder):
    """A version in the store; ``sha256`` has each file's. ``threads`` do the hashing. For one
    thread.
    """

    accepted = True

    def __init__(
        self, path: Path, digest: Digest, sha256: Mapping[str, str], threads: Executor
    ) -> None:
        super().__init__(path)
        self._digest = digest
        self._sha256 = sha256
        self._threads = threads
        self._read: dict[str, Future[str]] = {}

    def read(self, name: str, max_bytes: int) -> memoryview:
        """As ``AdapterFolder.read``; the bytes must not be written to before ``check``."""
        stretches: SimpleQueue[memoryview | None] = SimpleQueue()
        self._read[name] = self._threads.submit(_sha256, stretches)
        try:
            return read_file(self.path / name, max_bytes, stretches.put)
        finally:
            stretches.put(None)

    def check(self) -> None:
        """As ``AdapterFolder.check``: waits until all that was read is hashed."""
        for name, found in self._read.items():
            if found.result() != self._sha256.get(name):
                raise AdapterLoadError(f"{name} of adapter {self._digest} is damaged on the disk")


def _sha256(stretches: SimpleQueue[memoryview | None]) -> str:
    """Of stretches of bytes in the order in which they come, up to None."""
    found = hashlib.sha256()
    while (stretch := stretches.get()) is not None:
        found.update(stretch)  # without the GIL
    return found.hexdigest()
