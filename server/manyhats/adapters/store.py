"""Bytes at rest: adapter versions on disk, each in a folder named by the digest of its content.

::

    root/lock                           one process owns the store
    root/tmp/<random>/                  being written, or on its way out; emptied at start
    root/<aa>/<digest>/manifest.json    both files' length and SHA-256; its own is the digest
    root/<aa>/<digest>/adapter_config.json
    root/<aa>/<digest>/adapter_model.safetensors
    root/<aa>/<digest>/derived-<key>.safetensors    may be gone at any time; see derived.py

A version appears whole or not at all: both files and their folder are on the disk before one rename
makes it visible. They are never written to after that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from manyhats.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.lock import FileLock
from manyhats.errors import AdapterLoadError, AdapterRejectedError, ServiceError
from manyhats.types import Digest

FILES: Final = (CONFIG_NAME, WEIGHTS_NAME)
"""What a version consists of."""

MAX_CONFIG_BYTES: Final = 1 << 20
"""Bound of adapter_config.json, bytes (a real one has one or two thousand)."""

_MANIFEST: Final = "manifest.json"
_CHUNK: Final = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


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
        with _disk():
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
        with FileIO(self.path / _MANIFEST, "wb") as file:
            _write(file, manifest)
            os.fsync(file.fileno())
        for file in self._files.values():
            os.fsync(file.fileno())
        _sync_folder(self.path)
        return Digest(hashlib.sha256(manifest).hexdigest())

    def close(self) -> None:
        """Close the files and remove the folder, if it is still there."""
        for file in self._files.values():
            file.close()
        _remove(self.path)


class AdapterStore:
    """Content-addressed versions below ``root``. Thread-safe; every call may block on the disk.

    Raises ConfigError where another process owns ``root``; every call raises ServiceError where the
    disk fails it.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._owner = FileLock(root / "lock")
        self._lock = threading.Lock()
        self._tmp = root / "tmp"
        _remove(self._tmp)  # what a killed process left behind
        self._tmp.mkdir(exist_ok=True)

    def close(self) -> None:
        """Give the folder up to another process."""
        self._owner.release()

    @contextmanager
    def stage(self, max_bytes: int) -> Iterator[Staging]:
        """A Staging for up to ``max_bytes`` of weights, gone afterwards unless it was committed."""
        with _disk():
            folder = tempfile.mkdtemp(dir=self._tmp)
        staging = Staging(Path(folder), max_bytes)
        try:
            yield staging
        finally:
            staging.close()

    def commit(self, staging: Staging) -> Digest:
        """Make a staged version permanent and return its digest.

        The same content again changes nothing, unless what is there is damaged: then it is
        replaced. Raises AdapterRejectedError ``missing_file``.
        """
        with _disk():
            digest = staging.seal()
            target = self._folder(digest)
            with self._lock:
                if target.exists():
                    if self._is_intact(digest):
                        return digest
                    self._discard(target)
                target.parent.mkdir(exist_ok=True)
                _sync_folder(self._root)
                staging.path.rename(target)
                _sync_folder(target.parent)
            return digest

    def path(self, digest: Digest) -> Path:
        """The version's folder, its files and their lengths checked. Raises AdapterLoadError."""
        folder = self._folder(digest)
        for name, (length, _) in self._manifest(digest).items():
            try:
                size = (folder / name).stat().st_size
            except OSError as exc:
                raise AdapterLoadError(f"{name} of adapter {digest} cannot be read: {exc}") from exc
            if size != length:
                raise AdapterLoadError(
                    f"{name} of adapter {digest} has {size} bytes on the disk, not {length}"
                )
        return folder

    def verify(self, digest: Digest) -> None:
        """Read everything and compare it with the digest. Raises AdapterLoadError."""
        folder = self.path(digest)
        for name, (_, expected) in self._manifest(digest).items():
            try:
                with (folder / name).open("rb") as file:
                    actual = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as exc:
                raise AdapterLoadError(f"{name} of adapter {digest} cannot be read: {exc}") from exc
            if actual != expected:
                raise AdapterLoadError(f"{name} of adapter {digest} is damaged on the disk")

    def delete(self, digest: Digest) -> bool:
        """Remove a version's bytes; false where there were none. Open files can be read on."""
        folder = self._folder(digest)
        with _disk(), self._lock:
            if not folder.exists():
                return False
            self._discard(folder)
            return True

    def list(self) -> list[Digest]:
        """Digests of every version kept, sorted."""
        return sorted(
            Digest(folder.name)
            for folder in self._root.glob("[0-9a-f][0-9a-f]/*")
            if _DIGEST.fullmatch(folder.name)
        )

    def _folder(self, digest: Digest) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a digest: {digest!r}")
        return self._root / digest[:2] / digest

    def _manifest(self, digest: Digest) -> dict[str, tuple[int, str]]:
        try:
            content = (self._folder(digest) / _MANIFEST).read_bytes()
        except OSError as exc:
            raise AdapterLoadError(f"adapter {digest} is not in the store: {exc}") from exc
        if hashlib.sha256(content).hexdigest() != digest:
            raise AdapterLoadError(f"{_MANIFEST} of adapter {digest} is damaged on the disk")
        return {name: (length, sha) for name, length, sha in json.loads(content)["files"]}

    def _is_intact(self, digest: Digest) -> bool:
        try:
            self.verify(digest)
        except AdapterLoadError:
            return False
        return True

    def _discard(self, folder: Path) -> None:
        """Take a version away in one rename; its bytes go after that."""
        grave = Path(tempfile.mkdtemp(dir=self._tmp))
        folder.rename(grave / folder.name)
        _sync_folder(folder.parent)
        _remove(grave)


@contextmanager
def _disk() -> Iterator[None]:
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


def _remove(folder: Path) -> None:
    """Remove a folder of ``tmp``. What cannot be removed now is tried again at the next start."""
    shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
