"""The host tier: an LRU of compiled adapters in memory under a bound of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from manyhats.adapters.parts import CompiledAdapter
from manyhats.errors import AdapterLoadError
from manyhats.types import Digest


@dataclass(slots=True, eq=False)
class _Entry:
    """An adapter in memory. ``detached``: no longer to be found, counted while it is held.
    ``replaced``: need not be by an equal one.
    """

    adapter: CompiledAdapter
    nbytes: int
    holds: int = 0
    detached: bool = False
    replaced: bool = False


@dataclass(slots=True, eq=False)
class _Load:
    """A load on its way. ``holds``: callers who want the entry held; ``dropped``: keep it not."""

    future: Future[_Entry] = field(default_factory=Future)
    holds: int = 0
    dropped: bool = False


class HostCache:
    """LRU of compiled adapters, at most ``capacity_bytes`` of tensors. Thread-safe.

    ``load`` brings an adapter from the disk; one call at a time for a digest, its other callers
    wait for that one, and a failure goes to all of them and is not remembered. ``on_evict`` is
    told, outside the lock, which digest made room for another (not one that was dropped); it must
    be quick and must not raise.

    What is being loaded is not counted until it is there. What is held is never evicted, so a load
    that finds no room beside held adapters waits for a hold to end. Therefore a thread has one hold
    at a time, asks for nothing else within it (RuntimeError: it could wait for itself) and ends it
    itself.
    """

    def __init__(
        self,
        capacity_bytes: int,
        load: Callable[[Digest], CompiledAdapter],
        on_evict: Callable[[Digest], None] | None = None,
    ) -> None:
        self._capacity = capacity_bytes
        self._load = load
        self._on_evict = on_evict
        self._changed = threading.Condition()
        self._entries: OrderedDict[Digest, _Entry] = OrderedDict()
        self._loads: dict[Digest, _Load] = {}
        self._used = 0
        self._mine = threading.local()

    @property
    def capacity_bytes(self) -> int:
        """The bound, bytes."""
        return self._capacity

    @property
    def bytes_used(self) -> int:
        """Bytes kept or held; never over the capacity."""
        with self._changed:
            return self._used

    def __contains__(self, digest: Digest) -> bool:
        with self._changed:
            return digest in self._entries

    def get(self, digest: Digest) -> CompiledAdapter:
        """The adapter, loaded if need be. It may be evicted at any time after that; copy under
        ``hold`` instead.

        Raises AdapterLoadError if it is larger than the whole capacity, and whatever ``load``
        raises.
        """
        return self._acquire(digest, hold=False).adapter

    @contextmanager
    def hold(
        self, digest: Digest, derive: Callable[[], CompiledAdapter] | None = None
    ) -> Iterator[CompiledAdapter]:
        """The adapter, in memory and counted until the block ends. Raises what ``get`` raises.

        ``derive`` makes it in place of ``load``; it may ``get`` others, which it is made from.
        """
        entry = self._acquire(digest, hold=True, derive=derive)
        self._mine.holding = digest
        try:
            yield entry.adapter
        finally:
            self._mine.holding = None
            with self._changed:
                entry.holds -= 1
                if entry.detached and entry.holds == 0:
                    self._used -= entry.nbytes
                self._changed.notify_all()

    def drop(self, digest: Digest) -> int:
        """Forget an adapter: the next call loads it anew, its bytes go with the last hold. Returns
        how many these are.
        """
        with self._changed:
            if (load := self._loads.pop(digest, None)) is not None:
                load.dropped = True
            entry = self._entries.get(digest)
            if entry is None:
                return 0
            self._detach(digest, entry)
            return entry.nbytes

    def put(self, digest: Digest, adapter: CompiledAdapter) -> None:
        """Keep an adapter that comes back from the device, where there is room without waiting.

        Nothing changes where it is here, is on its way, or would need room that holds take.
        """
        evicted: list[Digest] = []
        nbytes = adapter.nbytes
        with self._changed:
            held = sum(e.nbytes for e in self._entries.values() if e.holds)
            detached = self._used - sum(e.nbytes for e in self._entries.values())
            known = digest in self._entries or digest in self._loads
            if known or held + detached + nbytes > self._capacity:
                return
            self._make_room(nbytes, evicted)
            self._entries[digest] = _Entry(adapter, nbytes, replaced=True)
            self._used += nbytes
        self._tell(evicted)

    def replace(self, digest: Digest, equal: Callable[[CompiledAdapter], CompiledAdapter]) -> int:
        """Put ``equal`` of an adapter in its place, once: the same, in other memory. Those who have
        the old one keep it. Returns its bytes, 0 where it is not here or has been replaced (or come
        back by ``put``) before, and nothing happens.
        """
        with self._changed:
            entry = self._entries.get(digest)
            if entry is None or entry.replaced:
                return 0
            entry.replaced = True
        entry.adapter = equal(entry.adapter)
        return entry.nbytes

    def _acquire(
        self,
        digest: Digest,
        *,
        hold: bool,
        derive: Callable[[], CompiledAdapter] | None = None,
    ) -> _Entry:
        if (held := getattr(self._mine, "holding", None)) is not None:
            raise RuntimeError(f"adapter {digest} was asked for while this thread holds {held}")
        with self._changed:
            if (entry := self._entries.get(digest)) is not None:
                self._entries.move_to_end(digest)
                entry.holds += hold
                return entry
            load = self._loads.get(digest)
            leader = load is None
            if load is None:
                load = self._loads[digest] = _Load()
            load.holds += hold
        if leader:
            self._run(digest, load, derive or partial(self._load, digest))
        return load.future.result()

    def _run(self, digest: Digest, load: _Load, make: Callable[[], CompiledAdapter]) -> None:
        """Load, make room, publish. Whatever goes wrong reaches everybody who waits."""
        evicted: list[Digest] = []
        try:
            self._publish(digest, load, make(), evicted)
        except BaseException as exc:
            with self._changed:
                if self._loads.get(digest) is load:
                    del self._loads[digest]
            load.future.set_exception(exc)
            if not isinstance(exc, Exception):
                raise
        self._tell(evicted)

    def _tell(self, evicted: list[Digest]) -> None:
        if self._on_evict is not None:
            for victim in evicted:
                self._on_evict(victim)

    def _publish(
        self, digest: Digest, load: _Load, adapter: CompiledAdapter, evicted: list[Digest]
    ) -> None:
        entry = _Entry(adapter, adapter.nbytes)
        if entry.nbytes > self._capacity:
            raise AdapterLoadError(
                f"adapter {digest} takes {entry.nbytes} bytes, the host tier has "
                f"{self._capacity} (host_cache_mb)"
            )
        with self._changed:
            self._make_room(entry.nbytes, evicted)
            entry.holds = load.holds
            entry.detached = load.dropped
            if not load.dropped:
                del self._loads[digest]
                self._entries[digest] = entry
            if entry.holds or not entry.detached:
                self._used += entry.nbytes
            load.future.set_result(entry)

    def _make_room(self, nbytes: int, evicted: list[Digest]) -> None:
        """Evict until ``nbytes`` fit, waiting for holds to end where nothing else is left. Lock
        held.
        """
        while self._used + nbytes > self._capacity:
            victim = next((d for d, e in self._entries.items() if e.holds == 0), None)
            if victim is None:
                self._changed.wait()
                continue
            self._detach(victim, self._entries[victim])
            evicted.append(victim)

    def _detach(self, digest: Digest, entry: _Entry) -> None:
        del self._entries[digest]
        entry.detached = True
        if entry.holds == 0:
            self._used -= entry.nbytes
            self._changed.notify_all()
