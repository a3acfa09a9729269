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
        """The one token that the sequence lacks."""
        self._decodes.append(ScheduledSequence(seq, seq.num_computed, 1, True))
        self.left -= 1

    def chunk(self, seq: Sequence) -> None:
        """As many of the sequence's tokens as there is budget for."""
        missing = len(seq.token_ids) - seq.num_computed
        count = min(self.left, missing)
        self._chunks.append(ScheduledSequence(seq, seq.num_computed, count, count == missing))
        self.left -= count

    def schedule(self) -> Schedule:
        """The step, in the order in which its tokens are packed."""
        # A chunk of one token that reaches the end is a decode for whoever packs the batch.
        short = [item for item in self._chunks if item.count == 1 and item.samples]
        long = [item for item in self._chunks if item.count > 1 or not item.samples]
        return Schedule((*self._decodes, *short, *long), tuple(self.preempted))
