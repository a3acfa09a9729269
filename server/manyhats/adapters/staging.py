"""A version while it is written: bounded, hashed, and brought to the disk before it is seen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from manyhats.adapters.folder import AdapterFolder
from manyhats.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from manyhats.errors import AdapterRejectedError, ServiceError
from manyhats.types import Digest

FILES: Final = (CONFIG_NAME, WEIGHTS_NAME)
"""What a version consists of."""

MAX_CONFIG_BYTES: Final = 1 << 20
"""Bound of adapter_config.json, bytes (a real one has one or two thousand)."""

MANIFEST: Final = "manifest.json"
"""Both files' length and SHA-256; its own is the digest."""

_CHUNK: Final = 1 << 20


def manifest_bytes(files: Mapping[str, tuple[int, str]]) -> bytes:
    """What the digest is the SHA-256 of; ``files`` maps a name to (length, hex SHA-256)."""
    rows = [[name, *files[name]] for name in sorted(files)]
    return json.dumps({"format": 1, "files": rows}, separators=(",", ":"), sort_keys=True).encode()


class Staging:
    """A version while it is written, in a private folder. For one thread at a time.

    ``path`` is the folder, for validation before the commit; ``max_bytes`` bounds the weights,
    MAX_CONFIG_BYTES the configuration, both while they are written.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._bounds = {CONFIG_NAME: MAX_CONFIG_BYTES, WEIGHTS_NAME: max_bytes}
        self._files: dict[str, FileIO] = {}
        self._hashes = {name: hashlib.sha256() for name in FILES}
        self._lengths = dict.fromkeys(FILES, 0)

    @property
    def folder(self) -> AdapterFolder:
        """What is there as a compilation reads it."""
        return AdapterFolder(self.path)

    def write(self, name: str, chunk: bytes) -> None:
        """Append ``chunk`` to the file ``name`` (one of FILES); readable through ``path`` at once.

        Raises AdapterRejectedError ``too_large`` before a byte over the bound is written,
        ServiceError (the disk).
        """
        bound = self._bounds[name]
        if self._lengths[name] + len(chunk) > bound:
            setting = " (max_adapter_mb)" if name == WEIGHTS_NAME else ""
            raise AdapterRejectedError(
                "too_large", f"{name} is over the bound of {bound} bytes{setting}", param=name
            )
        with disk():
            if name not in self._files:
                self._files[name] = FileIO(self.path / name, "xb")
            _write(self._files[name], chunk)
        self._hashes[name].update(chunk)
        self._lengths[name] += len(chunk)

    def copy(self, config: Path, weights: Path) -> None:
        """Copy two files in, whatever their length is by then; the bounds hold while they are read.

        Raises AdapterRejectedError: ``missing_file`` (absent, unreadable), ``path_not_allowed`` (a
        link, or no regular file), ``too_large``. Raises ServiceError (the disk).
        """
        for name, source in ((CONFIG_NAME, config), (WEIGHTS_NAME, weights)):
            with _open_regular(source) as file:
                while chunk := file.read(_CHUNK):
                    self.write(name, chunk)

    def check_complete(self) -> None:
        """Raises AdapterRejectedError ``missing_file`` unless both files are there."""
        for name in FILES:
            if not self._lengths[name]:
                raise AdapterRejectedError(
                    "missing_file", f"{name} is missing or empty", param=name
                )

    def seal(self) -> Digest:
        """Bring everything to the disk and return the digest. Raises what check_complete raises."""
        self.check_complete()
        manifest = manifest_bytes(
            {name: (self._lengths[name], self._hashes[name].hexdigest()) for name in FILES}
        )
        with FileIO(self.path / MANIFEST, "wb") as file:
            _write(file, manifest)
            os.fsync(file.fileno())
        for file in self._files.values():
            os.fsync(file.fileno())
        sync_folder(self.path)
        return Digest(hashlib.sha256(manifest).hexdigest())

    def close(self) -> None:
        """Close the files and remove the folder, if it is still there."""
        for file in self._files.values():
            file.close()
        remove(self.path)


@contextmanager
def disk() -> Iterator[None]:
    """Turns the disk's own failures (full, read-only) into the server's."""
    try:
        yield
    except OSError as exc:
        raise ServiceError(f"the adapter store cannot be written: {exc.strerror}") from exc


def _open_regular(path: Path) -> FileIO:
    """Open a regular file for reading; no link followed, no waiting on a pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        reason = "path_not_allowed" if exc.errno in (errno.ELOOP, errno.ENXIO) else "missing_file"
        raise AdapterRejectedError(reason, f"{path.name} cannot be read: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AdapterRejectedError("path_not_allowed", f"{path.name} is not a regular file")
    return FileIO(fd, "rb")


def _write(file: FileIO, data: bytes) -> None:
    """All of ``data``: nothing is left in a buffer, so closing the file cannot fail."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def remove(folder: Path) -> None:
    """Remove a folder of ``tmp``. What cannot be removed now is tried again at the next start."""
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
