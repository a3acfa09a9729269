"""What has been computed of a sequence, entered in it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from manyhats.scheduler.blocks import BlockManager, SchedulerStateError
from manyhats.types import ScheduledSequence, Sequence


def enter(
    blocks: BlockManager,
    seq: Sequence,
    items: SequenceABC[ScheduledSequence],
    token: int | None,
    *,
    finished: bool,
) -> None:
    """The ``items`` of one sequence were computed and ``token`` was drawn, each lane's next.

    Raises SchedulerStateError, nothing being changed, for an item out of date, a token that nobody
    was to draw, or an end (of the sequence, or of all known tokens) in some lanes alone.
    """
    for item in items:
        lane = item.sequence
        if (lane.whole or lane) is not seq or item.start != lane.num_computed:
            raise SchedulerStateError(f"sequence {lane.id} is not at position {item.start}")
        if (token is not None and not item.samples) or (
            token is None and item.samples and not finished
        ):
            raise SchedulerStateError(f"sequence {lane.id}: token {token}, samples {item.samples}")
    if (token is not None or finished) and len(items) != len(seq.computed):
        raise SchedulerStateError(f"sequence {seq.id} ends a step with some of its lanes")
    for item in items:
        lane = item.sequence
        lane.num_computed = item.start + item.count
        blocks.commit(lane, lane.num_computed)
        if token is not None:
            lane.token_ids.append(token)
    if token is not None and seq.lanes:
        seq.token_ids.append(token)
