"""The sequences that run, and the places in a step that they take."""

from __future__ import annotations

from collections.abc import Iterator

from manyhats.scheduler.holdings import Holdings, wearing
from manyhats.types import Priority, Sequence, SequenceStatus


class Running:
    """In the order of admission. Confined to the step loop's thread."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._seqs: dict[int, Sequence] = {}
        self._background = 0
        self._places = dict.fromkeys(Priority, 0)

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Sequence]:
        """A snapshot's iterator: sequences may leave meanwhile."""
        return iter(tuple(self._seqs.values()))

    def __contains__(self, seq: Sequence) -> bool:
        return self._seqs.get(seq.id) is seq

    @property
    def num_background(self) -> int:
        """How many of them are background sequences."""
        return self._background

    @property
    def places(self) -> int:
        """Places taken in a step: one a sequence, of an ensemble one a lane."""
        return sum(self._places.values())

    @property
    def live_places(self) -> int:
        """Those of live sequences: the others can be had."""
        return self._places[Priority.NORMAL]

    def of(self, priority: Priority) -> list[Sequence]:
        """Those of one priority."""
        if not self._background:
            return list(self._seqs.values()) if priority is Priority.NORMAL else []
        return [seq for seq in self._seqs.values() if seq.priority is priority]

    def victim(self) -> Sequence:
        """Who is preempted next: of background sequences, else of all, the one admitted last.

        Raises StopIteration where nothing runs.
        """
        return self.last_background() or next(reversed(self._seqs.values()))

    def last_background(self) -> Sequence | None:
        """The background sequence that was admitted last."""
        if not self._background:
            return None
        return next(seq for seq in reversed(self._seqs.values()) if seq.background)

    def background_leases(self) -> list[Sequence]:
        """The background sequences that hold a lease, the one admitted last first."""
        return [s for s in reversed(self.of(Priority.BACKGROUND)) if wearing(s)]

    def enter(self, seq: Sequence) -> None:
        """The sequence, which holds what it needs, runs from now on."""
        self._seqs[seq.id] = seq
        self._count(seq, 1)
        seq.status = SequenceStatus.RUNNING

    def leave(self, seq: Sequence) -> None:
        """The sequence runs no longer and gives back what it holds."""
        del self._seqs[seq.id]
        self._count(seq, -1)
        self._holdings.give_back(seq)

    def _count(self, seq: Sequence, sign: int) -> None:
        self._background += sign * seq.background
        self._places[seq.priority] += sign * len(seq.computed)
