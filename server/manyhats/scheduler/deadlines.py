"""Which requests have run out of time. Pure: no clock but the ``now`` that is passed in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceABC
from heapq import heapify, heappop, heappush
from typing import Final

from manyhats.errors import DeadlineExceededError
from manyhats.types import Sequence

_SLACK: Final = 64


class Deadlines:
    """Requests by when they must be done, in seconds of the monotonic clock.

    A request that ends before its deadline need not be taken out: ``open_requests`` says which are
    still there, and those that are not are forgotten as soon as they are more than the others. So
    each call costs O(log n), and what is kept stays within twice the open ones and a bit.
    """

    def __init__(self, open_requests: Callable[[], Collection[str]]) -> None:
        self._open = open_requests
        self._heap: list[tuple[float, str]] = []
        self._bound = _SLACK

    def add(self, request_id: str, deadline: float) -> None:
        """The request must be done at ``deadline``."""
        heappush(self._heap, (deadline, request_id))
        if len(self._heap) > self._bound:
            there = set(self._open()) | {request_id}
            self._heap = [entry for entry in self._heap if entry[1] in there]
            heapify(self._heap)
            self._bound = 2 * len(self._heap) + _SLACK

    def expired(self, now: float) -> list[str]:
        """The requests whose deadline has come, the earliest first; they are not given again."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            found.append(heappop(self._heap)[1])
        return found

    def wait_s(self, now: float) -> float | None:
        """How long nothing expires from ``now`` on; None: there is nothing that could."""
        return max(0.0, self._heap[0][0] - now) if self._heap else None

    def __len__(self) -> int:
        return len(self._heap)


def out_of_time(ended: SequenceABC[Sequence], now: float) -> DeadlineExceededError:
    """What a request is told that was ended at ``now`` with the sequences ``ended`` unfinished."""
    first = ended[0]
    waited = all(seq.output_len == 0 for seq in ended)
    how = "before its first token" if waited else f"after {first.output_len} tokens"
    return DeadlineExceededError(
        f"the request's time was up after {now - first.arrival:.3g} s, {how}", param="timeout"
    )
