"""What was computed from a version and the base together, kept beside the version's files.

DoRA's norms and the singular triplets of a conversion take long, and a version is compiled each
time it comes from the disk. One file a base: ``derived-<key>.safetensors``, where the key is of the
base's digest (its weights, quantization and dtype). It is no part of the version: it may be gone,
cut or of another base at any time, and is then computed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save

from manyhats.adapters.files import AdapterLimits, read_weights
from manyhats.errors import AdapterRejectedError

logger = logging.getLogger(__name__)

_FORMAT: Final = "1"
"""Changed when what is computed under a name changes."""

_PATTERN: Final = "derived-*.safetensors"
TEMPORARY: Final = ".derived-*.tmp"
"""What a process may leave in a version's folder that is killed while it saves."""

_SEPARATOR: Final = "/"

Tensors = Mapping[str, torch.Tensor]


class DerivedFile:
    """Implements ``formats.job.Derived`` in a version's folder. For one thread at a time.

    What is there is read at once; ``save`` writes what was computed since, if anything.
    """

    def __init__(self, folder: Path, base_digest: str, limits: AdapterLimits) -> None:
        self._key = hashlib.sha256(f"{_FORMAT}:{base_digest}".encode()).hexdigest()
        self._path = folder / _PATTERN.replace("*", self._key[:16])
        self._found = self._read(limits) if self._path.is_file() else {}
        self._new = False

    def get(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """As ``Derived.get``."""
        head = f"{name}{_SEPARATOR}"
        kept = {n.removeprefix(head): t for n, t in self._found.items() if n.startswith(head)}
        if kept:
            return kept
        computed = compute()
        self._found |= {f"{head}{n}": t.contiguous() for n, t in computed.items()}
        self._new = True
        return computed

    def save(self) -> None:
        """Keep what is new, in the place of what was kept for another base.

        A full disk, or a version that was deleted meanwhile, costs the next load its time alone.
        """
        if not self._new:
            return
        metadata = {"key": self._key, "sha256": _digest(self._found)}
        folder = self._path.parent
        temporary = folder / f".derived-{os.getpid()}-{threading.get_ident()}.tmp"
        try:
            temporary.write_bytes(save(dict(self._found), metadata=metadata))
            for other in folder.glob(_PATTERN):
                other.unlink(missing_ok=True)
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("what was computed for %s could not be kept: %s", folder.name, error)
        self._new = False

    def _read(self, limits: AdapterLimits) -> dict[str, torch.Tensor]:
        try:
            file = read_weights(self._path, limits)
            found = {name: file.load(name).clone() for name in file.tensors}
        except AdapterRejectedError as error:
            logger.warning("%s is computed again: %s", self._path, error.message)
            return {}
        if file.metadata.get("key") != self._key or file.metadata.get("sha256") != _digest(found):
            logger.warning("%s is computed again: it is damaged", self._path)
            return {}
        return found


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{list(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
