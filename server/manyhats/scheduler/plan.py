"""One step's work while it is being decided."""

from __future__ import annotations

from manyhats.types import Schedule, ScheduledSequence, Sequence


class StepPlan:
    """``left``: tokens that may still be added. ``preempted``: who lost their place for it."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.preempted: list[Sequence] = []
        self._decodes: list[ScheduledSequence] = []
        self._chunks: list[ScheduledSequence] = []

    def __bool__(self) -> bool:
        """Whether anybody computes anything."""
        return bool(self._decodes or self._chunks)

    def decode(self, seq: Sequence) -> None:
        """The one token that the sequence lacks, in each lane; there must be budget for it."""
        self._decodes += [ScheduledSequence(e, e.num_computed, 1, True) for e in seq.computed]
        self.left -= len(seq.computed)

    def chunk(self, seq: Sequence) -> None:
        """As many of the sequence's tokens as there is budget for.

        The token drawn at the end is every lane's next: all compute their last one together.
        """
        ends = sum(lane.left for lane in seq.computed) <= self.left
        kept = 1 if seq.lanes and not ends else 0
        for lane in seq.computed:
            count = min(self.left, lane.left - kept)
            if count > 0:
                self._chunks.append(ScheduledSequence(lane, lane.num_computed, count, ends))
                self.left -= count

    def schedule(self) -> Schedule:
        """The step, in the order in which its tokens are packed."""
        # A chunk of one token that reaches the end is a decode for whoever packs the batch.
        short = [item for item in self._chunks if item.count == 1 and item.samples]
        long = [item for item in self._chunks if item.count > 1 or not item.samples]
        return Schedule((*self._decodes, *short, *long), tuple(self.preempted))


def decodes(seq: Sequence) -> bool:
    """Whether a running sequence, with all its lanes, lacks just one token."""
    return all(lane.left == 1 for lane in seq.computed)
