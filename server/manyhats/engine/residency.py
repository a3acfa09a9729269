"""Brings adapters to the device beside the step loop: disk -> host tier -> rank rows.

Who may sit where is decided by ``adapters.slots.SlotTable``; this file runs the loads on threads of
its own and reports to the step thread through ``post``. ``drop`` and ``prefetch`` may be called
from any thread and post themselves there; every other public method is called on the step thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from manyhats.adapters.compose import compose
from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.host import HostCache
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.slots import Acquired, Present, SlotTable, StartLoad, Wait
from manyhats.engine.exchange import Exchange
from manyhats.engine.interface import EngineObserver, ResidentAdapter
from manyhats.engine.load_errors import as_load_error, check_virtual_tokens
from manyhats.engine.loader_threads import loader_threads
from manyhats.engine.pins import DevicePins
from manyhats.engine.pool import AdapterPool
from manyhats.errors import AdapterLoadError, ManyhatsError, RequestError
from manyhats.scheduler.residency import Admission, Failed, Pending, Ready
from manyhats.types import AdapterRef, Composition, Digest, Sequence

logger = logging.getLogger(__name__)

_PENDING = Pending()


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of one adapter version that somebody asked for.

    ``needs`` (``AdapterPool.needs``) is set once the adapter has been on the host, ``slot`` once it
    has one; ``waiters`` are the tickets of sequences that were told to wait; a failure holds for
    those who waited when it happened. ``leases`` counts this file's own.
    """

    ref: AdapterRef
    needs: tuple[int, ...] | None = None
    slot: int = -1
    loading: bool = False
    placed: bool = False
    dropped: bool = False
    found: bool = False
    leases: int = 0
    waiters: set[int] = field(default_factory=set)
    failed: dict[int, ManyhatsError] = field(default_factory=dict)


class AdapterResidency:
    """The scheduler's ``Residency`` over slots, host tier and device pool."""

    def __init__(
        self,
        slots: SlotTable,
        pool: AdapterPool,
        load: Callable[[Digest], CompiledAdapter],
        *,
        host_bytes: int,
        limits: AdapterLimits,
        post: Callable[[Callable[[], None]], None],
        observer: EngineObserver,
    ) -> None:
        """``load`` reads an adapter from the disk tier; ``host_bytes`` bounds the host tier,
        ``limits`` what a composition comes to.
        """
        self._limits = limits
        self._slots = slots
        self._pool = pool
        self._host = HostCache(host_bytes, load, on_evict=self._host_evicted)
        self._exchange = Exchange(pool, self._host, post)
        self._post = post
        self._observer = observer
        self._entries: dict[Digest, _Entry] = {}
        self._pins = DevicePins(slots, self.prepare, self.cancel)
        # One writer to the device at a time: SitePool's masks have a single writer.
        self._host_threads = loader_threads("adapter-host", 2)
        self._device_thread = loader_threads("adapter-device", 1)

    def prefetch(self, ref: AdapterRef) -> None:
        """Starts to bring what the adapter's lanes wear to the host tier and undoes a ``drop``.

        Thread-safe.
        """
        for worn in ref.lanes:
            if worn is not None:
                self._post(partial(self._prefetch, worn))

    def prepare(self, seq: Sequence) -> Admission:
        """Gets the adapter on its way, takes no lease; Ready where ``acquire`` would be too."""
        return self._ask(seq, lease=False)

    def acquire(self, seq: Sequence) -> Admission:
        """Ready with a lease, Pending while the adapter is on its way or waits, or Failed."""
        return self._ask(seq, lease=True)

    def release(self, seq: Sequence) -> None:
        """Ends the sequence's lease."""
        if seq.adapter is None:
            return
        digest = seq.adapter.digest
        self._slots.release(digest)
        self._wake()
        entry = self._entries[digest]
        entry.leases -= 1
        if entry.dropped and not entry.leases:
            entry.placed = False
            self._clear(entry)
            self._forget_if_idle(digest)
        self._pins.advance()

    def cancel(self, seq: Sequence) -> None:
        """Forgets a sequence that waited and will not come back."""
        if seq.adapter is None:
            return
        digest = seq.adapter.digest
        self._slots.cancel_wait(seq.ticket)
        self._wake()
        entry = self._entries.get(digest)
        if entry is not None:
            entry.waiters.discard(seq.ticket)
            entry.failed.pop(seq.ticket, None)
            self._forget_if_idle(digest)

    def drop(self, ref: AdapterRef) -> None:
        """No new lease; rows and host bytes go now, or with the last lease. Thread-safe."""
        self._post(lambda: self._drop(ref.digest))

    def pin(self, ref: AdapterRef) -> None:
        """Brings the adapter to the device as soon as there is room and keeps it. Thread-safe."""
        self._post(lambda: self._pins.pin(ref))

    def unpin(self, ref: AdapterRef) -> None:
        """Lets it be evicted again. Thread-safe."""
        self._post(lambda: self._pins.unpin(ref))

    def residents(self) -> tuple[ResidentAdapter, ...]:
        """Adapters on the device, ready to be worn."""
        return tuple(
            ResidentAdapter(self._entries[r.digest].ref, r.slot, r.leases, r.pinned)
            for r in self._slots.residents()
            if r.ready
        )

    def waiting_adapters(self) -> tuple[str, ...]:
        """Names (with version) of adapters that a sequence waits for."""
        return tuple(str(e.ref) for e in self._entries.values() if e.waiters)

    @property
    def rows_used(self) -> int:
        """Rank rows in use at the fullest site."""
        return max(self._slots.row_usage[:-1], default=0)  # the last are pages, not rows

    @property
    def host(self) -> HostCache:
        """The host tier."""
        return self._host

    def close(self) -> None:
        """Waits for running loads and ends the threads."""
        self._host_threads.shutdown(wait=True, cancel_futures=True)
        self._device_thread.shutdown(wait=True, cancel_futures=True)

    def _entry(self, ref: AdapterRef) -> _Entry:
        return self._entries.setdefault(ref.digest, _Entry(ref))

    def _prefetch(self, ref: AdapterRef) -> None:
        entry = self._entry(ref)
        if entry.dropped:
            entry.dropped = False
            self._slots.restore(ref.digest)
        self._start_host_load(entry)

    def _start_host_load(self, entry: _Entry) -> None:
        if entry.needs is None and not entry.loading:
            entry.loading = True
            self._host_threads.submit(self._load_host, entry.ref)

    def _ask(self, seq: Sequence, *, lease: bool) -> Admission:
        if seq.adapter is None:
            raise ValueError("a sequence of the base needs no slot")
        entry = self._entry(seq.adapter)
        error = entry.failed.pop(seq.ticket, None)
        if error is not None:
            return self._fail(seq, entry, error)
        if entry.needs is None:
            if not entry.loading:
                self._device_thread.submit(self._pool.ahead)
            self._start_host_load(entry)
            entry.waiters.add(seq.ticket)
            return _PENDING
        ask = self._slots.acquire if lease else self._slots.prepare
        try:
            answer = ask(entry.ref.digest, entry.needs, seq.ticket)
        except AdapterLoadError as failure:
            return self._fail(seq, entry, failure)
        if isinstance(answer, Present) and seq.whole is not None and not entry.found:
            entry.found = True  # it may go to somebody older from now on
            self._wake()
        return self._answer(seq, entry, answer)

    def _answer(
        self, seq: Sequence, entry: _Entry, answer: Acquired | Present | StartLoad | Wait
    ) -> Admission:
        if isinstance(answer, Acquired | Present):
            entry.waiters.discard(seq.ticket)
            entry.leases += isinstance(answer, Acquired)
            return Ready(answer.slot)
        entry.waiters.add(seq.ticket)
        if isinstance(answer, StartLoad):
            for digest in answer.evicted:
                evicted = self._entries[digest]
                self._observer.adapter_evicted(evicted.ref.label, "device")
                evicted.placed = False
                self._exchange.leaving(digest)
                self._device_thread.submit(self._exchange.take_back, digest, evicted.slot)
                self._forget_if_idle(digest)
            entry.placed, entry.found = True, False
            entry.slot = answer.slot
            self._device_thread.submit(self._load_device, entry.ref, answer.slot, answer.starts)
        return _PENDING

    def _wake(self) -> None:
        """Room may have come for somebody who was asked for before in this step: have another."""
        self._post(lambda: None)

    def _clear(self, entry: _Entry) -> None:
        """Frees the bytes of an adapter that has lost its place, before anything takes that."""
        self._device_thread.submit(self._pool.clear, entry.slot)

    def _fail(self, seq: Sequence, entry: _Entry, error: ManyhatsError) -> Failed:
        entry.waiters.discard(seq.ticket)
        self._slots.cancel_wait(seq.ticket)
        self._forget_if_idle(entry.ref.digest)
        return Failed(error)

    def _forget_if_idle(self, digest: Digest) -> None:
        """Drops what is known of an adapter that nobody waits for and that is not on the device.
        What it left on the host is not on its way any longer, and is brought to its compact form.
        """
        entry = self._entries.get(digest)
        if entry is not None and not (entry.waiters or entry.loading or entry.placed):
            del self._entries[digest]
            self._host_threads.submit(self._exchange.pack, digest)

    def _host_evicted(self, digest: Digest) -> None:
        entry = self._entries.get(digest)
        # Nobody on the device or in the queue knows the name of one that is long gone.
        self._observer.adapter_evicted(entry.ref.label if entry is not None else "(gone)", "host")

    # The two loads run on their own threads and touch nothing of the step thread's but through
    # post().

    def _hold(self, ref: AdapterRef) -> AbstractContextManager[CompiledAdapter]:
        """The adapter on the host, a composition made of its members there."""
        whole = ref.composition
        if whole is None:
            return self._host.hold(ref.digest)
        return self._host.hold(ref.digest, partial(self._compose, ref, whole))

    def _compose(self, ref: AdapterRef, composition: Composition) -> CompiledAdapter:
        members = [self._host.get(member.digest) for member in composition.members]
        whole = compose(ref, composition, members, self._limits)
        for member in composition.members:
            self._exchange.pack(member.digest)
        return whole

    def _load_host(self, ref: AdapterRef) -> None:
        started = time.monotonic()
        try:
            with self._hold(ref) as adapter:
                needs = self._pool.needs(adapter)
                check_virtual_tokens(ref, adapter)
        except Exception as error:  # noqa: BLE001 - any failure is this adapter's alone, and is reported
            failure = as_load_error(ref, error)
            self._post(lambda: self._failed(ref, failure))
            return
        self._observer.adapter_loaded(ref.label, "host", time.monotonic() - started)
        self._post(lambda: self._on_host(ref, needs))

    def _load_device(self, ref: AdapterRef, slot: int, starts: tuple[int, ...]) -> None:
        started = time.monotonic()
        try:
            with self._hold(ref) as adapter:
                self._pool.write(slot, starts, adapter)
        except Exception as error:  # noqa: BLE001 - any failure is this adapter's alone, and is reported
            failure = as_load_error(ref, error)
            self._post(lambda: self._device_failed(ref, failure))
            return
        self._observer.adapter_loaded(ref.label, "device", time.monotonic() - started)
        self._post(lambda: self._on_device(ref))  # who waits goes on; the host's memory can wait
        self._exchange.placed(ref.digest, slot)

    # What the loads post: on the step thread again.

    def _on_host(self, ref: AdapterRef, needs: tuple[int, ...]) -> None:
        entry = self._entry(ref)
        entry.loading = False
        entry.needs = needs
        if not entry.waiters:  # else it goes to the device next
            self._host_threads.submit(self._exchange.pack, ref.digest)
        self._pins.advance()

    def _on_device(self, ref: AdapterRef) -> None:
        if not self._slots.loaded(ref.digest):
            self._entry(ref).placed = False
            self._clear(self._entry(ref))
            self._forget_if_idle(ref.digest)
        self._pins.advance()

    def _device_failed(self, ref: AdapterRef, error: ManyhatsError) -> None:
        self._slots.load_failed(ref.digest)
        self._entry(ref).placed = False
        self._failed(ref, error)

    def _failed(self, ref: AdapterRef, error: ManyhatsError) -> None:
        if isinstance(error, RequestError):
            logger.info("adapter %s is refused: %s", ref, error.message)
        else:
            logger.error("adapter %s cannot be loaded: %s", ref, error.message)
            self._observer.adapter_load_failed(ref.label)
        entry = self._entry(ref)
        entry.loading = False
        entry.needs = None
        entry.failed = dict.fromkeys(entry.waiters, error)
        self._pins.advance()
        self._forget_if_idle(ref.digest)

    def _drop(self, digest: Digest) -> None:
        self._host.drop(digest)
        self._exchange.dropped(digest)
        self._pins.forget(digest)
        gone = self._slots.drop(digest)
        entry = self._entries.get(digest)
        if entry is not None:
            entry.dropped = True
            if entry.placed and gone:
                self._clear(entry)
            entry.placed = not gone
            self._forget_if_idle(digest)
