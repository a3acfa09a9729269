"""What the host tier and the device keep of an adapter between them.

On a CPU both are the same memory, so an adapter that lies whole in the pool's rows is not kept on
the host besides: it leaves the host tier when it comes to the device, and is read back from its
rows when another takes its place there. What cannot be read back (parts beside rank rows, another
device's memory) stays on the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from manyhats.adapters.compact import compact
from manyhats.adapters.host import HostCache
from manyhats.engine.heap import Trimmer
from manyhats.engine.pool import AdapterPool
from manyhats.types import Digest

logger = logging.getLogger(__name__)


class Exchange:
    """Between one host tier and one pool.

    ``leaving`` and ``dropped`` are called on the step thread, ``placed`` and ``take_back`` on the
    device's, ``pack`` on any. ``post`` runs a call on the step thread.
    """

    def __init__(
        self, pool: AdapterPool, host: HostCache, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._pool = pool
        self._host = host
        self._post = post
        self._leaving: set[Digest] = set()
        self._heap = Trimmer()

    def leaving(self, digest: Digest) -> None:
        """A ``take_back`` of the adapter is about to be asked for."""
        self._leaving.add(digest)

    def dropped(self, digest: Digest) -> None:
        """No version has this content any more: what is being taken back is not kept."""
        self._leaving.discard(digest)

    def placed(self, digest: Digest, slot: int) -> None:
        """The adapter has been written to the slot, and nobody holds it any longer."""
        if self._pool.holds_all(slot):
            self._heap.loaded(self._host.drop(digest))
        else:
            self.pack(digest)

    def take_back(self, digest: Digest, slot: int) -> None:
        """Empties the slot; its adapter goes to the host tier unless that has no room."""
        try:
            adapter = self._pool.read(slot)
            if adapter is not None:
                self._host.put(digest, compact(adapter))
        except (OSError, MemoryError) as error:
            logger.warning("adapter %s is not kept on the host: %s", digest, error)
        finally:
            self._pool.clear(slot)
        self._post(partial(self._taken, digest))

    def pack(self, digest: Digest) -> None:
        """Brings an adapter of the host tier to its compact form."""
        try:
            self._heap.loaded(self._host.replace(digest, compact))
        except (OSError, MemoryError) as error:
            logger.warning("adapter %s stays as it was loaded: %s", digest, error)

    def _taken(self, digest: Digest) -> None:
        if digest in self._leaving:
            self._leaving.remove(digest)
        else:  # dropped meanwhile
            self._host.drop(digest)
