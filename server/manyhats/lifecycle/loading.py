"""From the store to the tiers above it: what registration and the engine's loader share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from manyhats.adapters.compose import compose
from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.store import AdapterStore
from manyhats.errors import AdapterLoadError, AdapterRejectedError
from manyhats.lifecycle.registry import Registry
from manyhats.types import AdapterRef, Digest

logger = logging.getLogger(__name__)

Compile = Callable[[Path], CompiledAdapter]
"""Reads and checks a version's folder. Raises AdapterRejectedError. The digest is put in later."""


class Residency(Protocol):
    """The tiers above the disk, as registration sees them. Thread-safe; returns at once."""

    def prefetch(self, ref: AdapterRef) -> None:
        """Start to bring the version to the host tier; undoes a ``drop`` of the same content."""

    def drop(self, ref: AdapterRef) -> None:
        """No new lease on the version; its memory goes now, or with the last lease."""


def load_adapter(store: AdapterStore, compile_folder: Compile, digest: Digest) -> CompiledAdapter:
    """A version out of the store, lengths checked, in canonical form: what fills the host tier.

    Raises AdapterLoadError, also for what was accepted once and is no longer (damaged bytes, a
    lower ``max_rank``).
    """
    try:
        return replace(compile_folder(store.path(digest)), digest=digest)
    except AdapterRejectedError as exc:
        raise AdapterLoadError(f"adapter {digest} can no longer be served: {exc.message}") from exc


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


def reconcile(store: AdapterStore, registry: Registry) -> None:
    """Bring the store in line with the registry after a death between the two."""
    kept, known = set(store.list()), registry.digests()
    for digest in kept - known:
        store.delete(digest)
        logger.info("removed %s from the store: no version refers to it", digest)
    for digest in known - kept:
        logger.error("adapter version %s is registered, its bytes are missing", digest)
