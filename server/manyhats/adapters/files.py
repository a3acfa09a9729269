"""Reading an adapter's two files as what they are: input from strangers.

Nothing unpickles. Paths are resolved before they are compared with the allowed roots; files are
opened without following links and without blocking, and read whole into memory of our own: a file
that its owner truncates while it is mapped would kill the process (SIGBUS), a private copy cannot
change after it was checked.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from manyhats.adapters.header import parse_header
from manyhats.adapters.names import (
    ADAPTERHUB_WEIGHTS_NAME,
    CONFIG_NAME,
    HEAD_NAMES,
    WEIGHTS_NAME,
)
from manyhats.adapters.strict_json import parse_object, shown
from manyhats.adapters.weights_file import WeightsFile
from manyhats.config import Settings
from manyhats.errors import AdapterRejectedError

_PICKLED_NAMES: Final = (
    "adapter_model.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "pytorch_model.bin",
    "pytorch_adapter.bin",
)
_MAX_CONFIG_DEPTH: Final = 16
_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Bounds of what is accepted; sizes in bytes. The defaults are those of the settings.

    ``max_dense_bytes``: of all replaced weights of an adapter in the parts' dtype;
    ``max_conversion_error``: of a weight change that is approximated by a low-rank product, the
    Frobenius norm of what is left out over that of the whole.
    """

    max_rank: int = 64
    max_virtual_tokens: int = 512
    max_dense_bytes: int = 256 * 2**20
    max_conversion_error: float = 1e-3
    max_bytes: int = 512 * 2**20
    max_tensors: int = 20_000
    max_config_bytes: int = 2**20
    max_header_bytes: int = 8 * 2**20

    @classmethod
    def of(cls, settings: Settings) -> AdapterLimits:
        """The bounds that the settings name."""
        return cls(
            max_rank=settings.max_rank,
            max_bytes=settings.max_adapter_mb << 20,
            max_virtual_tokens=settings.max_virtual_tokens,
            max_dense_bytes=settings.max_dense_mb << 20,
            max_conversion_error=settings.max_conversion_error,
        )


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's files: resolved, regular, inside an allowed root when they were looked at."""

    config_path: Path
    weights_path: Path


def locate(folder: Path, roots: Sequence[Path]) -> AdapterFiles:
    """Find an adapter's two files in ``folder``.

    The folder, and each file after its own links are resolved, must lie within one of ``roots`` (a
    root itself is within). Nothing is said about what exists outside of them.

    Raises:
        AdapterRejectedError: ``path_not_allowed``, ``missing_file`` (says which),
            ``pickle_refused`` (only a pickled file is there), ``unsupported_feature`` (a prediction
            head lies beside what AdapterHub saved).
    """
    allowed = [_resolve(root) for root in roots]
    home = _within(folder, allowed)
    if not stat.S_ISDIR(_mode(home)):
        raise AdapterRejectedError("missing_file", f"{shown(str(folder))} is not a folder")
    config = _regular(home / CONFIG_NAME, allowed)
    weights = _regular(home / WEIGHTS_NAME, allowed)
    if weights is None:
        weights = _regular(home / ADAPTERHUB_WEIGHTS_NAME, allowed)
        if weights is not None:
            _refuse_head(home)
    if weights is None:
        # lexists: where a link of that name leads is not looked at
        pickled = [name for name in _PICKLED_NAMES if os.path.lexists(home / name)]
        if pickled:
            raise AdapterRejectedError(
                "pickle_refused",
                f"{shown(str(folder))} has {pickled[0]}, a pickle; only {WEIGHTS_NAME} is read",
            )
    if config is None or weights is None:
        raise AdapterRejectedError(
            "missing_file",
            f"{shown(str(folder))} has no {CONFIG_NAME if config is None else WEIGHTS_NAME}",
        )
    return AdapterFiles(config_path=config, weights_path=weights)


def _refuse_head(home: Path) -> None:
    for name in HEAD_NAMES:
        if os.path.lexists(home / name):
            raise AdapterRejectedError(
                "unsupported_feature",
                f"{shown(str(home))} has {name}: a prediction head is not served (save the adapter "
                "with with_head=False if its head was not trained)",
            )


def read_config(data: bytes | memoryview, limits: AdapterLimits) -> dict[str, object]:
    """Parse the text of an adapter_config.json into an object of plain JSON values, all of them
    finite.

    Raises:
        AdapterRejectedError: ``too_large`` or ``bad_config``.
    """
    if len(data) > limits.max_config_bytes:
        raise _too_large(CONFIG_NAME, len(data), limits.max_config_bytes)
    return parse_object(
        bytes(data), reason="bad_config", what=CONFIG_NAME, max_depth=_MAX_CONFIG_DEPTH
    )


def read_config_file(path: Path, limits: AdapterLimits) -> dict[str, object]:
    """``read_config`` of a file; raises also what ``read_file`` raises."""
    return read_config(read_file(path, limits.max_config_bytes), limits)


def read_weights(path: Path, limits: AdapterLimits) -> WeightsFile:
    """Read and check a safetensors file; tensors' values are checked when they are loaded.

    Raises:
        AdapterRejectedError: what ``read_file`` and ``parse_weights`` raise.
    """
    return parse_weights(read_file(path, limits.max_bytes), limits)


def parse_weights(
    data: bytes | bytearray | memoryview, limits: AdapterLimits, *, finite: bool = False
) -> WeightsFile:
    """Check a whole safetensors file that is in memory already (copied if it cannot be written to).
    ``finite``: its values need not be looked at, they are known to be.

    Raises:
        AdapterRejectedError: ``too_large``, or what ``parse_header`` raises.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(WEIGHTS_NAME, len(data), limits.max_bytes)
    header = parse_header(
        data, max_header_bytes=limits.max_header_bytes, max_tensors=limits.max_tensors
    )
    data = bytearray(data) if isinstance(data, bytes) else data
    return WeightsFile(data, header, finite=finite)


def read_file(
    path: Path, max_bytes: int, seen: Callable[[memoryview], None] | None = None
) -> memoryview:
    """The bytes of a regular file of at most ``max_bytes``; the size is checked before anything is
    read. ``seen`` is given each stretch of what is returned, in order, as soon as it is there.

    Raises:
        AdapterRejectedError: ``missing_file`` (absent or not readable), ``path_not_allowed`` (a
            link, or no regular file), ``too_large``.
    """
    fd = _open(path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterRejectedError("path_not_allowed", f"{path.name} is not a regular file")
        if status.st_size > max_bytes:
            raise _too_large(path.name, status.st_size, max_bytes)
        data, filled = np.empty(status.st_size, np.uint8).data, 0  # a bytearray is zeroed first
        while filled < len(data):
            count = os.readv(fd, [data[filled : filled + _READ_BYTES]])
            if not count:
                break
            if seen is not None:
                seen(data[filled : filled + count])
            filled += count
    finally:
        os.close(fd)
    if filled < len(data):
        raise AdapterRejectedError("bad_header", f"{path.name} became shorter while it was read")
    return data


def _open(path: Path) -> int:
    # NONBLOCK: opening a FIFO must not hang; NOFOLLOW: the path was resolved, so a link is newer
    # than the check
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        no_file = error.errno in (errno.ELOOP, errno.ENXIO)  # a link; a socket
        reason = "path_not_allowed" if no_file else "missing_file"
        raise _unreadable(path, error, reason) from None


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # too long; a loop of links; a NUL
        raise AdapterRejectedError(
            "path_not_allowed", f"{shown(str(path))} is not a usable path"
        ) from None


def _within(path: Path, allowed: Sequence[Path]) -> Path:
    """``path`` resolved, if it lies in one of ``allowed`` (resolved themselves)."""
    resolved = _resolve(path)
    if not any(resolved.is_relative_to(root) for root in allowed):
        raise AdapterRejectedError(
            "path_not_allowed",
            f"{shown(str(path))} is not within a folder that adapters may be registered from",
        )
    return resolved


def _regular(path: Path, allowed: Sequence[Path]) -> Path | None:
    """The resolved path of a regular file within ``allowed``; None where nothing is there."""
    resolved = _within(path, allowed)
    mode = _mode(resolved)
    if mode and not stat.S_ISREG(mode):
        raise AdapterRejectedError("path_not_allowed", f"{path.name} is not a regular file")
    return resolved if mode else None


def _mode(path: Path) -> int:
    """The mode of what is at ``path``; 0 where nothing is."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise _unreadable(path, error, "missing_file") from None


def _unreadable(path: Path, error: OSError, reason: str) -> AdapterRejectedError:
    return AdapterRejectedError(reason, f"{shown(path.name)} cannot be read: {error.strerror}")


def _too_large(name: str, size: int, bound: int) -> AdapterRejectedError:
    return AdapterRejectedError("too_large", f"{name} has {size} bytes, over the bound of {bound}")
