"""The sequences that run, with what they hold: cache blocks and adapter leases."""

from __future__ import annotations

from collections.abc import Iterator

from manyhats.scheduler.blocks import BlockManager
from manyhats.scheduler.residency import Residency
from manyhats.types import BASE_SLOT, Priority, Sequence, SequenceStatus


class Running:
    """In the order of admission. Confined to the step loop's thread."""

    def __init__(self, blocks: BlockManager, residency: Residency) -> None:
        self._blocks = blocks
        self._residency = residency
        # Left free at an admission, lest those that run already be preempted at once.
        self._reserve = max(1, blocks.num_blocks // 100)
        self._seqs: dict[int, Sequence] = {}
        self._background = 0

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

    def enter(self, seq: Sequence) -> None:
        """The sequence, which holds what it needs, runs from now on."""
        self._seqs[seq.id] = seq
        self._background += seq.background
        seq.status = SequenceStatus.RUNNING

    def leave(self, seq: Sequence) -> None:
        """The sequence runs no longer and gives back what it holds."""
        del self._seqs[seq.id]
        self._background -= seq.background
        self._blocks.free(seq)
        if seq.adapter is not None:
            self._residency.release(seq)
        seq.slot = BASE_SLOT

    def take_blocks(self, seq: Sequence) -> bool:
        """Blocks for all known tokens, cached ones included; for one alone there always are."""
        if self._seqs and self._blocks.num_free <= self._reserve:
            return False
        cached = self._blocks.match(seq)
        fits = self._blocks.allocate(seq, len(seq.token_ids))
        if fits and self._seqs and self._blocks.num_free < self._reserve:
            fits = False
        if not fits:
            self._blocks.cancel_match(seq)
            return False
        seq.num_computed = cached
        seq.num_cached = min(cached, seq.prompt_len)
        return True
