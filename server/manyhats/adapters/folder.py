"""An adapter's folder as a compilation reads it: each file once, whole, into memory of our own.

What comes out of the store must be what its digest says. The SHA-256 of a file takes longer than
all the rest of a load, so it is computed on a thread of its own, of the very bytes that are worked
on meanwhile; whoever keeps or passes on anything made of them calls ``check`` before that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from manyhats.adapters.files import read_file
from manyhats.errors import AdapterLoadError
from manyhats.types import Digest


class AdapterFolder:
    """A folder of which nothing is known beforehand: one that is being registered."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, max_bytes: int) -> bytearray:
        """The file ``name``, of at most ``max_bytes``. Raises what ``read_file`` raises."""
        return read_file(self.path / name, max_bytes)

    def check(self) -> None:
        """Raises AdapterLoadError unless what was read is what it should be."""


class StoredFolder(AdapterFolder):
    """A version in the store; ``sha256`` has each file's. For one thread."""

    def __init__(self, path: Path, digest: Digest, sha256: Mapping[str, str]) -> None:
        super().__init__(path)
        self._digest = digest
        self._sha256 = sha256
        self._read: dict[str, _Hashing] = {}

    def read(self, name: str, max_bytes: int) -> bytearray:
        """As ``AdapterFolder.read``; the bytes must not be written to before ``check``."""
        hashing = self._read[name] = _Hashing()
        try:
            return read_file(self.path / name, max_bytes, hashing.add)
        finally:
            hashing.end()

    def check(self) -> None:
        """As ``AdapterFolder.check``: waits until all that was read is hashed."""
        for name, hashing in self._read.items():
            if hashing.hexdigest() != self._sha256.get(name):
                raise AdapterLoadError(f"{name} of adapter {self._digest} is damaged on the disk")


class _Hashing:
    """SHA-256 of stretches of bytes in the order in which they come, on a thread of its own."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._stretches: SimpleQueue[memoryview | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="adapter-digest", daemon=True)
        self._thread.start()

    def add(self, stretch: memoryview) -> None:
        self._stretches.put(stretch)

    def end(self) -> None:
        """Nothing more comes."""
        self._stretches.put(None)

    def hexdigest(self) -> str:
        """Waits for the end."""
        self._thread.join()
        return self._hash.hexdigest()

    def _run(self) -> None:
        while (stretch := self._stretches.get()) is not None:
            self._hash.update(stretch)  # without the GIL
