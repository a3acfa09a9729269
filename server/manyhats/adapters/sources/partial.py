"""A file that is being fetched: what is there already, and of which version of the source.

``NAME.part`` grows; ``NAME.version`` holds what the source called the version that it is of (an
entity tag, a date). Both stay where a fetch breaks off, so that the next one goes on from there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

from manyhats.adapters.sources.progress import Progress
from manyhats.errors import AdapterRejectedError, ServiceError


class PartialFile:
    """One file below ``folder``, open for writing. ``bound`` in bytes."""

    def __init__(self, folder: Path, name: str, bound: int, progress: Progress) -> None:
        self._part = folder / f"{name}.part"
        self._version = folder / f"{name}.version"
        self._target = folder / name
        self._name = name
        self._bound = bound
        self._progress = progress
        self._counted = 0
        self._expected: int | None = None
        self._file = self._part.open("ab")

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self._file.tell()

    @property
    def version(self) -> str:
        """Of which version of the source they are; empty where nobody said."""
        try:
            return self._version.read_text()
        except FileNotFoundError:
            return ""

    def begin(self, version: str, total: int | None, *, resumed: bool) -> None:
        """The source answers: with the rest of what is there, or from the start. ``total``: the
        whole file's bytes, if it says. Raises AdapterRejectedError ``too_large``.
        """
        if not resumed:
            self._file.truncate(0)
            self._file.seek(0)
            self._version.write_text(version)
        if total is not None:
            self._check(total)
            if self._expected is None:
                self._progress.expect(total)
            self._expected = total
        self._progress.add(self.size - self._counted)
        self._counted = self.size

    def write(self, chunk: bytes) -> None:
        """The next bytes. Raises AdapterRejectedError ``too_large``, ServiceError (the disk)."""
        self._check(self.size + len(chunk))
        try:
            self._file.write(chunk)
            self._file.flush()
        except OSError as error:
            raise ServiceError(f"{self._name} cannot be written: {error.strerror}") from error
        self._counted += len(chunk)
        self._progress.add(len(chunk))

    @property
    def complete(self) -> bool:
        """Whether all that was announced is there."""
        return self._expected is None or self.size == self._expected

    def finish(self) -> None:
        """All is there: give the file its name."""
        self._file.close()
        self._part.replace(self._target)
        self._version.unlink(missing_ok=True)

    def discard(self) -> None:
        """There is no such file: leave nothing of it."""
        for path in (self._part, self._target):
            path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)

    def _check(self, size: int) -> None:
        if size > self._bound:
            raise AdapterRejectedError(
                "too_large",
                f"{self._name} is over the bound of {self._bound} bytes (max_adapter_mb)",
                param="source",
            )


def check_digest(path: Path, expected: str | None) -> None:
    """Raises AdapterRejectedError ``digest_mismatch`` unless the file's SHA-256 is ``expected``."""
    if expected is None:
        return
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise AdapterRejectedError(
            "digest_mismatch", f"the weights' SHA-256 is {actual}, not {expected}", param="sha256"
        )
