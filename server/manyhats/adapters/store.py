"""Bytes at rest: adapter versions on disk, each in a folder named by the digest of its content.

::

    root/lock                           shared by registrations, exclusive while bytes are removed
    root/registry                       which registry's versions these are
    root/tmp/<random>/                  one process's: being written, or on its way out; removed
                                        by the next one to start once its ``lock`` is free
    root/<aa>/<digest>/manifest.json    both files' length and SHA-256; its own is the digest
    root/<aa>/<digest>/adapter_config.json
    root/<aa>/<digest>/adapter_model.safetensors
    root/<aa>/<digest>/derived-<key>.safetensors    may be gone at any time; see derived.py

A version appears whole or not at all: both files and their folder are on the disk before one rename
makes it visible. They are never written to after that, so that any number of processes may share
the folder; only who removes bytes must know that nobody is about to register them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from manyhats.adapters.derived import TEMPORARY
from manyhats.adapters.folder import StoredFolder
from manyhats.adapters.lock import locked, try_lock
from manyhats.adapters.staging import MANIFEST, Staging, disk, remove, sync_folder
from manyhats.errors import AdapterLoadError, ConfigError
from manyhats.types import Digest

_ABANDONED_S: Final = 3600
_LOCK: Final = "lock"
_HASHING: Final = 2
"""Threads, as many as bring adapters to the host at once; they start with the first load."""
_MARK: Final = "registry"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdapterStore:
    """Content-addressed versions below ``root``, which processes may share. Thread-safe; every call
    may block on the disk and raises ServiceError where it fails.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._hashing = ThreadPoolExecutor(_HASHING, thread_name_prefix="adapter-digest")
        with disk():
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / _LOCK, exclusive=True):
                _remove_abandoned(root / "tmp")
                self._tmp = Path(tempfile.mkdtemp(dir=root / "tmp"))
                (self._tmp / _LOCK).touch()
                self._mine = try_lock(self._tmp / _LOCK)

    def close(self) -> None:
        """Leave nothing behind but the versions."""
        self._hashing.shutdown()
        with self._lock:
            if self._mine is not None:
                remove(self._tmp)
                os.close(self._mine)
                self._mine = None

    def claim(self, registry: str, *, replace: bool = False) -> None:
        """Say whose versions these are: ``registry`` identifies a registry.

        Unless ``replace``, raises ConfigError where they are another one's, which would lose them
        at the next sweep.
        """
        mark = self._root / _MARK
        with disk(), locked(self._root / _LOCK, exclusive=True):
            if replace or not mark.exists():
                new = self._tmp / _MARK
                new.write_text(registry, "ascii")
                new.rename(mark)
            elif mark.read_text("ascii") != registry:
                raise ConfigError(
                    f"{self._root} holds the adapters of another registry; give this server its "
                    "own folder (--home, --store), or restore the registry that they belong to"
                )

    @contextmanager
    def adding(self) -> Iterator[None]:
        """No process removes bytes while the block runs: from a commit until it is registered."""
        with _disk_lock(self._root / _LOCK, exclusive=False):
            yield

    @contextmanager
    def removing(self) -> Iterator[None]:
        """No process is within ``adding`` while the block runs, nor another within this.

        What no version refers to then may be deleted.
        """
        with _disk_lock(self._root / _LOCK, exclusive=True):
            yield

    @contextmanager
    def stage(self, max_bytes: int) -> Iterator[Staging]:
        """A Staging for up to ``max_bytes`` of weights, gone afterwards unless it was committed."""
        with disk():
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
        with disk():
            digest = staging.seal()
            target = self._folder(digest)
            with self._lock:
                if target.exists():
                    if self.intact(digest):
                        return digest
                    self._discard(target)
                target.parent.mkdir(exist_ok=True)
                sync_folder(self._root)
                try:
                    staging.path.rename(target)
                except OSError:  # another process was faster with the same content
                    if not target.exists():
                        raise
                sync_folder(target.parent)
            return digest

    def path(self, digest: Digest) -> Path:
        """The version's folder, its files and their lengths checked. Raises AdapterLoadError."""
        return self._checked(digest, self._manifest(digest))

    def open(self, digest: Digest) -> StoredFolder:
        """``path``, for who reads the files and has them checked while they are worked on."""
        manifest = self._manifest(digest)
        path = self._checked(digest, manifest)
        sha256 = {name: sha for name, (_, sha) in manifest.items()}
        return StoredFolder(path, digest, sha256, self._hashing)

    def verified(self, digest: Digest) -> Path:
        """``path`` of a version that is what its digest says. Reads everything.

        Raises AdapterLoadError.
        """
        folder = self.path(digest)
        for name, (_, expected) in self._manifest(digest).items():
            try:
                with (folder / name).open("rb") as file:
                    actual = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as exc:
                raise AdapterLoadError(f"{name} of adapter {digest} cannot be read: {exc}") from exc
            if actual != expected:
                raise AdapterLoadError(f"{name} of adapter {digest} is damaged on the disk")
        return folder

    def delete(self, digest: Digest) -> bool:
        """Remove a version's bytes; false where there were none. Open files can be read on."""
        folder = self._folder(digest)
        with disk(), self._lock:
            if not folder.exists():
                return False
            self._discard(folder)
            return True

    def size(self, digest: Digest) -> int:
        """Bytes of a version's files, what was derived from them too; 0 where there are none."""
        with disk():
            return _size(self._folder(digest))

    def age_s(self, digest: Digest, now: float) -> float:
        """Seconds since the version was committed, or touched; 0 where there are no bytes."""
        try:
            return now - self._folder(digest).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def touch(self, digest: Digest) -> None:
        """Begin its age anew, if it is there."""
        with disk(), suppress(FileNotFoundError):
            os.utime(self._folder(digest))

    def tidy(self, now: float) -> None:
        """Remove what a process left within versions that was killed an hour ago or more."""
        with disk():
            for path in self._root.glob(f"[0-9a-f][0-9a-f]/*/{TEMPORARY}"):
                with suppress(FileNotFoundError):
                    if now - path.stat().st_mtime > _ABANDONED_S:
                        path.unlink()

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
            content = (self._folder(digest) / MANIFEST).read_bytes()
        except OSError as exc:
            raise AdapterLoadError(f"adapter {digest} is not in the store: {exc}") from exc
        if hashlib.sha256(content).hexdigest() != digest:
            raise AdapterLoadError(f"{MANIFEST} of adapter {digest} is damaged on the disk")
        return {name: (length, sha) for name, length, sha in json.loads(content)["files"]}

    def _checked(self, digest: Digest, manifest: Mapping[str, tuple[int, str]]) -> Path:
        folder = self._folder(digest)
        for name, (length, _) in manifest.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as exc:
                raise AdapterLoadError(f"{name} of adapter {digest} cannot be read: {exc}") from exc
            if size != length:
                raise AdapterLoadError(
                    f"{name} of adapter {digest} has {size} bytes on the disk, not {length}"
                )
        return folder

    def intact(self, digest: Digest) -> bool:
        """Whether the version is there, and what its digest says. Reads everything."""
        try:
            self.verified(digest)
        except AdapterLoadError:
            return False
        return True

    def _discard(self, folder: Path) -> None:
        """Take a version away in one rename; its bytes go after that."""
        grave = Path(tempfile.mkdtemp(dir=self._tmp))
        with suppress(FileNotFoundError):  # another process takes it away just now
            folder.rename(grave / folder.name)
        sync_folder(folder.parent)
        remove(grave)


@contextmanager
def _disk_lock(path: Path, *, exclusive: bool) -> Iterator[None]:
    """``locked``; what the block itself raises is left as it is."""
    with ExitStack() as stack:
        with disk():
            stack.enter_context(locked(path, exclusive=exclusive))
        yield


def _remove_abandoned(tmp: Path) -> None:
    """Remove the folders below ``tmp`` whose process has gone."""
    tmp.mkdir(exist_ok=True)
    for folder in tmp.iterdir():
        try:
            fd = try_lock(folder / _LOCK)
        except (FileNotFoundError, NotADirectoryError):  # killed before it had its lock
            remove(folder)
            continue
        if fd is not None:
            remove(folder)
            os.close(fd)


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:
        return 0
