"""The line before a full adapter pool: one place an adapter, by the age of its oldest request."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.types import Digest


@dataclass(slots=True, eq=False)
class Waiter:
    """An adapter that waits for room, and the tickets (arrival order) of the requests that asked.

    ``tried`` and ``checked`` are the table's change counters at the last attempt and at the last
    check that it can fit at all: asking again costs nothing while nothing has changed.
    """

    digest: Digest
    ranks: tuple[int, ...]
    tickets: set[int]
    oldest: int
    tried: int = -1
    checked: int = -1


class WaitLine:
    """Waiters by the age of their oldest ticket. Asking again, by any request, keeps the place."""

    __slots__ = ("_head", "_waiters")

    def __init__(self) -> None:
        self._waiters: dict[Digest, Waiter] = {}
        self._head: Waiter | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def head(self) -> Waiter | None:
        """Whoever is next."""
        return self._head

    def get(self, digest: Digest) -> Waiter | None:
        """The adapter's place, None if it does not wait."""
        return self._waiters.get(digest)

    def digests(self) -> tuple[Digest, ...]:
        """Who waits, next one first."""
        return tuple(w.digest for w in sorted(self._waiters.values(), key=lambda w: w.oldest))

    def join(self, digest: Digest, ranks: tuple[int, ...], ticket: int) -> Waiter:
        """Add the ticket to the adapter's place, making one where there is none."""
        waiter = self._waiters.get(digest)
        if waiter is None:
            waiter = self._waiters[digest] = Waiter(digest, ranks, {ticket}, ticket)
        else:
            waiter.tickets.add(ticket)
            if ticket < waiter.oldest:
                waiter.oldest = ticket
                waiter.tried = -1  # an older request may take what is kept for younger ones
        if self._head is None or waiter.oldest < self._head.oldest:
            self._head = waiter
        return waiter

    def leave(self, digest: Digest) -> Waiter | None:
        """Give the adapter's place up, with all its tickets; None if it had none."""
        waiter = self._waiters.pop(digest, None)
        if waiter is not None and waiter is self._head:
            self._find_head()
        return waiter

    def cancel(self, ticket: int) -> None:
        """Forget one request; the adapter's place moves back to its next oldest, or goes."""
        for waiter in tuple(self._waiters.values()):
            if ticket not in waiter.tickets:
                continue
            waiter.tickets.remove(ticket)
            if not waiter.tickets:
                del self._waiters[waiter.digest]
            else:
                waiter.oldest = min(waiter.tickets)
            self._find_head()

    def _find_head(self) -> None:
        self._head = min(self._waiters.values(), key=lambda w: w.oldest, default=None)
