"""Who sits where on the device: slots, rank rows, leases, pins, and the line of those that wait.

Pure bookkeeping for the step loop's thread; it moves no weights. What it promises:

- Rows of two adapters never overlap; an adapter with a lease or a pin never loses its place.
- Room is made by evicting the least recently used adapters that nobody holds, as few as will do,
  and none at all where that would not be enough.
- Nobody starves. Adapters that find no room wait in one line, by the age of their oldest request,
  and only the first of the line is placed. For it, *victims* are chosen among the adapters in use
  (fewest leases, then least recently used) and drained: requests younger than the waiting one get
  no new lease on a victim and join the line; its leases end, and it is evicted.
- An adapter that was loaded for a waiting request keeps its place until that request comes for it,
  so that nothing is loaded only to be thrown out again; until then it is not drained either.
- A request may want several adapters at once (an ensemble) and asks for each with one ticket. What
  it has found present already is kept for it against younger requests, and never makes room for its
  others. So the oldest of such requests always gets on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhats.adapters.answers import Acquired, Present, Resident, StartLoad, Wait, WaitReason
from manyhats.adapters.room import Placement, Room
from manyhats.adapters.rows import SlotStateError
from manyhats.adapters.waitline import Waiter, WaitLine
from manyhats.errors import AdapterLoadError
from manyhats.types import Digest

__all__ = [
    "Acquired",
    "Placement",
    "Present",
    "Resident",
    "SlotStateError",
    "SlotTable",
    "StartLoad",
    "Wait",
    "WaitReason",
]


@dataclass(slots=True, eq=False)
class _Entry:
    digest: Digest
    place: Placement
    requesters: set[int]  # requests that the place is kept for, until the next lease
    ready: bool = False
    leased_before: bool = False
    claimed: bool = False  # the request that it was brought for has found it present
    leases: int = 0
    pinned: bool = False
    dropped: bool = False

    @property
    def reserved(self) -> bool:
        """Brought for a request that has not come for it yet."""
        return not self.leased_before and bool(self.requesters)

    def evictable(self, ticket: int) -> bool:
        """Whether it may go at once for a request with this ticket."""
        if not self.ready or self.leases or self.pinned or (self.reserved and not self.claimed):
            return False
        return not self.requesters or min(self.requesters) > ticket


@dataclass(slots=True)
class _Drain:
    """The victims for the head of the line, and the layout in which they were seen to be enough."""

    digest: Digest
    victims: frozenset[Digest]
    layout: int


class SlotTable:
    """``num_slots`` adapters at once, ``rows_per_site[i]`` rank rows at site i. Not thread-safe.

    A *ticket* is a request's arrival order: unique, smaller is older. A request that got anything
    but a lease asks again with the same ticket until it has one, or says ``cancel_wait``.
    """

    def __init__(self, num_slots: int, rows_per_site: Sequence[int]) -> None:
        self._room = Room(num_slots, rows_per_site)
        self._entries: dict[Digest, _Entry] = {}  # least recently used first
        self._line = WaitLine()
        self._drain: _Drain | None = None
        self._epoch = 0  # counts changes that may have made room
        self._layout = 0  # counts changes of who sits where, and of pins

    def acquire(
        self, digest: Digest, ranks: Sequence[int], ticket: int
    ) -> Acquired | StartLoad | Wait:
        """Take a lease, or get the adapter on its way. ``ranks[i]``: rows needed at site i.

        Raises AdapterLoadError where the adapter can never fit, cannot fit while the present pins
        last, or was dropped and is still in use.
        """
        entry = self._ask(digest, ranks, ticket)
        if not isinstance(entry, _Entry):
            return entry
        entry.leases += 1
        entry.leased_before = True
        entry.requesters.clear()
        self._line.leave(digest)
        return Acquired(entry.place.slot)

    def prepare(
        self, digest: Digest, ranks: Sequence[int], ticket: int
    ) -> Present | StartLoad | Wait:
        """As ``acquire``, for a request that cannot run yet: takes no lease.

        An adapter that is present is kept for the request, against younger ones, until the next
        lease on it or ``cancel_wait``.
        """
        entry = self._ask(digest, ranks, ticket)
        if not isinstance(entry, _Entry):
            return entry
        if not entry.claimed and ticket in entry.requesters:
            entry.claimed = True
            self._epoch += 1
        entry.requesters.add(ticket)
        drain, head = self._drain, self._line.head
        if drain and head and digest in drain.victims and head.oldest == ticket:
            self._drain = None  # what was to make room for it is what it wants as well
        self._line.leave(digest)  # as the head it would hold up what else the request wants
        return Present(entry.place.slot)

    def cancel_wait(self, ticket: int) -> None:
        """The request is gone: give up its place in the line and what is kept for it."""
        self._line.cancel(ticket)
        for entry in self._entries.values():
            entry.requesters.discard(ticket)
        self._epoch += 1

    def loaded(self, digest: Digest) -> bool:
        """The copy is done. False: the adapter was dropped meanwhile, and its place is free."""
        entry = self._loading(digest)
        if entry.dropped:
            self._remove(entry)
            return False
        entry.ready = True
        self._epoch += 1
        return True

    def load_failed(self, digest: Digest) -> None:
        """The copy failed: free the place. The caller tells whoever waited for it."""
        self._remove(self._loading(digest))

    def release(self, digest: Digest) -> None:
        """End one lease. The last one of a dropped adapter frees its place."""
        entry = self._entry(digest)
        if entry.leases < 1:
            raise SlotStateError(f"adapter {digest} has no lease to release")
        entry.leases -= 1
        self._touch(entry)
        if entry.leases == 0:
            self._epoch += 1
            if entry.dropped:
                self._remove(entry)

    def pin(self, digest: Digest) -> None:
        """Keep the adapter, which has a place, until ``unpin`` or ``drop``."""
        self._set_pin(self._entry(digest), True)

    def unpin(self, digest: Digest) -> None:
        """Let the adapter be evicted again."""
        self._set_pin(self._entry(digest), False)

    def drop(self, digest: Digest) -> bool:
        """The adapter was unregistered: no new lease, no place in the line, its pin gone.

        True: it holds nothing on the device now. False: its place is freed when the running load
        or the last lease ends. It must not be asked for again before it is registered again
        (``restore``).
        """
        self._line.leave(digest)
        entry = self._entries.get(digest)
        if entry is None:
            return True
        self._set_pin(entry, False)
        if entry.ready and entry.leases == 0:
            self._remove(entry)
            return True
        entry.dropped = True
        return False

    def restore(self, digest: Digest) -> None:
        """The same content was registered again: undo ``drop`` if it has not taken effect yet."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.dropped = False

    def residents(self) -> tuple[Resident, ...]:
        """Everyone with a place, least recently used first."""
        return tuple(
            Resident(e.digest, e.place.slot, e.leases, e.pinned, e.ready)
            for e in self._entries.values()
        )

    def placement(self, digest: Digest) -> Placement:
        """Where the adapter is. Raises SlotStateError if it has no place."""
        return self._entry(digest).place

    def waiting(self) -> tuple[Digest, ...]:
        """The adapters in the line, next one first."""
        return self._line.digests()

    @property
    def num_slots(self) -> int:
        """Slots, taken or not."""
        return self._room.num_slots

    @property
    def row_usage(self) -> tuple[int, ...]:
        """Rows in use at each site."""
        return self._room.used_rows

    def check_invariants(self) -> None:
        """Raise RuntimeError if the bookkeeping contradicts itself. Slow: for tests."""
        self._room.check_invariants(e.place for e in self._entries.values())
        for entry in self._entries.values():
            if entry.leases < 0 or (entry.leases and not entry.ready):
                raise RuntimeError(f"adapter {entry.digest} has {entry.leases} leases")
            if entry.leases == 0 and entry.dropped and entry.ready:
                raise RuntimeError(f"adapter {entry.digest} was dropped and still has its place")

    def _ask(self, digest: Digest, ranks: Sequence[int], ticket: int) -> _Entry | StartLoad | Wait:
        """The entry where it may be leased now, else what the request has to wait for."""
        entry = self._entries.get(digest)
        if entry is None:
            return self._bring(digest, ranks, ticket)
        if entry.dropped:
            raise AdapterLoadError("The adapter was unregistered while it was still in use.")
        if not entry.ready:
            entry.requesters.add(ticket)
            return Wait(WaitReason.LOADING)
        if self._closed_to(entry, ticket):
            entry.requesters.discard(ticket)
            self._line.join(digest, entry.place.ranks, ticket)
            return Wait(WaitReason.FULL)
        self._touch(entry)
        return entry

    def _bring(self, digest: Digest, ranks: Sequence[int], ticket: int) -> StartLoad | Wait:
        """Join the line and, if that makes it the first, take the room there is."""
        waiter = self._line.get(digest)
        if waiter is None or waiter.checked != self._layout:
            try:
                self._room.check_possible(ranks)
            except AdapterLoadError:
                self._line.leave(digest)
                raise
        waiter = self._line.join(digest, tuple(ranks), ticket)
        waiter.checked = self._layout
        drain = self._drain
        tried = waiter.tried == self._epoch and drain is not None and drain.digest == digest
        if tried or waiter is not self._line.head:
            return Wait(WaitReason.FULL)
        victims = self._victims(
            waiter.ranks, [e for e in self._entries.values() if e.evictable(waiter.oldest)]
        )
        if victims is not None:
            return self._place(waiter, victims)
        waiter.tried = self._epoch
        if not self._plan_drain(waiter) and ticket == waiter.oldest:
            self._line.leave(digest)
            raise AdapterLoadError(
                "There is no room on the device for it beside the other adapters of its ensemble."
            )
        return Wait(WaitReason.FULL)

    def _victims(
        self, ranks: Sequence[int], candidates: Sequence[_Entry]
    ) -> tuple[_Entry, ...] | None:
        places = self._room.fewest(ranks, [e.place for e in candidates])
        if places is None:
            return None
        slots = {place.slot for place in places}
        return tuple(e for e in candidates if e.place.slot in slots)

    def _place(self, waiter: Waiter, victims: Sequence[_Entry]) -> StartLoad:
        for victim in victims:
            self._remove(victim)
        place = self._room.take(waiter.ranks)
        self._entries[waiter.digest] = _Entry(waiter.digest, place, set(waiter.tickets))
        self._line.leave(waiter.digest)
        self._drain = None
        self._layout += 1
        return StartLoad(place.slot, place.starts, tuple(e.digest for e in victims))

    def _closed_to(self, entry: _Entry, ticket: int) -> bool:
        """Whether the adapter is being drained for a request older than this one."""
        head, drain = self._line.head, self._drain
        if head is None or drain is None or drain.digest != head.digest or entry.reserved:
            return False
        return entry.digest in drain.victims and ticket > head.oldest

    def _plan_drain(self, waiter: Waiter) -> bool:
        """Choose victims for the head of the line, and keep to them: a new choice each time as
        leases come and go might never see one drained. False: none do beside what it has."""
        drain = self._drain
        candidates = [
            e for e in self._entries.values() if not e.pinned and waiter.oldest not in e.requesters
        ]
        if drain is not None and drain.digest == waiter.digest:
            chosen = [e for e in candidates if e.digest in drain.victims]
            same = drain.layout == self._layout and len(chosen) == len(drain.victims)
            if same or self._victims(waiter.ranks, chosen) is not None:
                drain.layout = self._layout
                return True
        candidates.sort(key=lambda e: (not e.ready or e.reserved, e.leases))
        victims = self._victims(waiter.ranks, candidates)
        if victims is None:
            return False
        self._drain = _Drain(waiter.digest, frozenset(e.digest for e in victims), self._layout)
        return True

    def _set_pin(self, entry: _Entry, pinned: bool) -> None:
        if entry.pinned != pinned:
            entry.pinned = pinned
            self._epoch += 1
            self._layout += 1
            self._room.set_pinned(e.place for e in self._entries.values() if e.pinned)

    def _remove(self, entry: _Entry) -> None:
        self._set_pin(entry, False)
        self._room.give(entry.place)
        del self._entries[entry.digest]
        self._epoch += 1
        self._layout += 1

    def _touch(self, entry: _Entry) -> None:
        del self._entries[entry.digest]
        self._entries[entry.digest] = entry

    def _loading(self, digest: Digest) -> _Entry:
        entry = self._entry(digest)
        if entry.ready:
            raise SlotStateError(f"adapter {digest} was not being loaded")
        return entry

    def _entry(self, digest: Digest) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            raise SlotStateError(f"adapter {digest} has no place on the device")
        return entry
