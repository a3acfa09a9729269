"""What a sequence holds while it runs: cache blocks and an adapter's lease, for each of its lanes.

All of it or nothing: no lane keeps anything that the others did not get, so that no two ensembles
wait for each other with half of what they need.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from manyhats.scheduler.blocks import BlockManager
from manyhats.scheduler.residency import Admission, Failed, Pending, Ready, Residency
from manyhats.types import BASE_SLOT, Sequence


class Holdings:
    """Takes and gives back. Confined to the step loop's thread."""

    def __init__(self, blocks: BlockManager, residency: Residency) -> None:
        self._blocks = blocks
        self._residency = residency
        # Left free at an admission, lest those that run already be preempted at once.
        self._reserve = max(1, blocks.num_blocks // 100)

    def prepare(self, seq: Sequence) -> Admission:
        """Get what the sequence wears on its way, in every lane: the worst answer."""
        return _worst([self._residency.prepare(lane) for lane in wearing(seq)])

    def take_blocks(self, seq: Sequence, *, alone: bool) -> bool:
        """Blocks for all known tokens, cached ones included; for one alone there always are."""
        if not alone and self._blocks.num_free <= self._reserve:
            return False
        for lane in seq.computed:
            lane.num_computed = self._blocks.match(lane)
            lane.num_cached = min(lane.num_computed, lane.prompt_len)
        fits = self.grow(seq)
        if fits and not alone and self._blocks.num_free < self._reserve:
            fits = False
        if not fits:
            self.cancel_blocks(seq)
        elif seq.lanes:
            seq.num_cached = min(lane.cached_prompt_tokens for lane in seq.lanes)
        return fits

    def cancel_blocks(self, seq: Sequence) -> None:
        """Undo ``take_blocks``."""
        for lane in seq.computed:
            self._blocks.cancel_match(lane)
            lane.num_computed = 0

    def grow(self, seq: Sequence) -> bool:
        """Blocks for all known tokens; False: too few are free (some lanes may have got theirs)."""
        return all(self._blocks.allocate(lane, len(lane.token_ids)) for lane in seq.computed)

    def lease(self, seq: Sequence) -> Admission:
        """Take the leases of a sequence that was found Ready: all where the answer is Ready."""
        held: list[Sequence] = []
        for lane in wearing(seq):
            answer = self._residency.acquire(lane)
            if not isinstance(answer, Ready):
                self._release(held)
                return answer
            lane.slot = answer.slot
            held.append(lane)
        return Ready(BASE_SLOT)

    def give_back(self, seq: Sequence) -> None:
        """All that a running sequence holds."""
        for lane in seq.computed:
            self._blocks.free(lane)
        self._release(wearing(seq))

    def cancel(self, seq: Sequence) -> None:
        """A waiting sequence is gone: nothing is to be brought or kept for it."""
        for lane in wearing(seq):
            self._residency.cancel(lane)

    def _release(self, lanes: SequenceABC[Sequence]) -> None:
        for lane in lanes:
            self._residency.release(lane)
            lane.slot = BASE_SLOT


def wearing(seq: Sequence) -> list[Sequence]:
    """The sequence, or those of its lanes, that wear an adapter."""
    return [lane for lane in seq.computed if lane.adapter is not None]


def _worst(answers: SequenceABC[Admission]) -> Admission:
    """A failure, or that somebody is waited for; Ready where all are."""
    for kind in (Failed, Pending):
        for answer in answers:
            if isinstance(answer, kind):
                return answer
    return Ready(BASE_SLOT)
