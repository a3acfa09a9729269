"""From the store to the tiers above it: what registration and the engine's loader share."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Protocol

from manyhats.adapters.compose import compose
from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.folder import AdapterFolder
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.store import AdapterStore
from manyhats.errors import AdapterLoadError, AdapterRejectedError
from manyhats.lifecycle.snapshot import Difference
from manyhats.types import AdapterRef, Digest

_DROPPED_REMEMBERED: Final = 1024

Compile = Callable[[AdapterFolder], CompiledAdapter]
"""Reads and checks a version's folder. Raises AdapterRejectedError, and what the folder's ``check``
raises, which it calls before it keeps anything. The digest is put in later."""


class Residency(Protocol):
    """The tiers above the disk, as registration sees them. Thread-safe; returns at once."""

    def prefetch(self, ref: AdapterRef) -> None:
        """Start to bring the version to the host tier; undoes a ``drop`` of the same content."""

    def drop(self, ref: AdapterRef) -> None:
        """No new lease on the version; its memory goes now, or with the last lease."""


def checked(
    compile_folder: Compile, check: Callable[[AdapterRef, CompiledAdapter], object]
) -> Compile:
    """``compile_folder`` that asks the engine too, under a name that nobody can ask for.

    ``check`` raises AdapterRejectedError.
    """

    def run(folder: AdapterFolder) -> CompiledAdapter:
        adapter = compile_folder(folder)
        digest = Digest(f"unregistered-{secrets.token_hex(16)}")
        check(AdapterRef("(unregistered)", 1, digest, adapter.virtual_tokens), adapter)
        return adapter

    return run


def load_adapter(store: AdapterStore, compile_folder: Compile, digest: Digest) -> CompiledAdapter:
    """A version out of the store in canonical form: what fills the host tier. Its bytes are held to
    the digest while they are compiled, and nothing is returned before that is done.

    Raises AdapterLoadError, also for what was accepted once and is no longer (damaged bytes, a
    lower ``max_rank``).
    """
    folder = store.open(digest)
    try:
        adapter = compile_folder(folder)
    except AdapterRejectedError as exc:
        folder.check()  # damage is told as such, whatever it looks like
        raise AdapterLoadError(f"adapter {digest} can no longer be served: {exc.message}") from exc
    folder.check()
    return replace(adapter, digest=digest)


def load_lanes(
    store: AdapterStore, compile_folder: Compile, ref: AdapterRef, limits: AdapterLimits
) -> Iterator[CompiledAdapter]:
    """What the lanes of a composition wear, one after the other; the base's is left out.

    Raises AdapterLoadError, AdapterRejectedError (not to be composed).
    """
    for lane in ref.lanes:
        if lane is None:
            continue
        whole = lane.composition
        if whole is None:
            yield load_adapter(store, compile_folder, lane.digest)
        else:
            members = [load_adapter(store, compile_folder, m.digest) for m in whole.members]
            yield compose(lane, whole, members, limits)


class Tiers:
    """The tiers above the disk, and what they were told to drop: running requests may still hold
    it there, so they must be told as well if it comes back. Thread-safe; returns at once.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._lock = threading.Lock()
        self._dropped: deque[Digest] = deque(maxlen=_DROPPED_REMEMBERED)

    def prefetch(self, ref: AdapterRef) -> None:
        """Start to bring a version to the host tier."""
        self._residency.prefetch(ref)

    def drop(self, ref: AdapterRef) -> None:
        """No version has this content any more."""
        with self._lock:
            self._dropped.append(ref.digest)
        self._residency.drop(ref)

    def back(self, ref: AdapterRef) -> None:
        """A version has this content (again)."""
        with self._lock:
            if ref.digest not in self._dropped:
                return
            self._dropped.remove(ref.digest)
        self._residency.prefetch(ref)

    def follow(self, difference: Difference) -> None:
        """Another replica has changed the registry."""
        for ref in difference.gone:
            self.drop(ref)
        for ref in difference.added:
            self.back(ref)
