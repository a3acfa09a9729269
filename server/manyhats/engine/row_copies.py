"""Rank rows on their way from the host to the pool.

To a GPU they go on a stream of their own, so that no kernel of a running step waits behind them,
and through pinned memory: from there alone a copy runs beside the host's work (CUDA C++ Programming
Guide, "Page-Locked Host Memory"). One stretch of it is filled while another one is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Final, Protocol

import torch

Copies = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
"""Copies every value, on the host, to its rows, of the same shape; they are there on return. For
one thread."""

_ALIGN: Final = 64
_LANES: Final = 2
_LANE_BYTES: Final = 4 << 20


def copies_to(device: torch.device) -> Copies:
    """The way to a device."""
    if device.type != "cuda":
        return _copy_all
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return StagedCopies([CudaLane(stream, _LANE_BYTES) for _ in range(_LANES)])


def _copy_all(rows: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    if rows:  # in one call: hundreds would cost more than what they copy
        torch._foreach_copy_(list(rows), list(values))


class Lane(Protocol):
    """Memory on the host that copies go through. ``room``: uint8, contiguous."""

    room: torch.Tensor

    def send(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Start to copy to the first of each pair from the second, which lies in ``room``."""

    def wait(self) -> None:
        """Until all that was sent has arrived, and ``room`` may be written to again."""


class CudaLane:
    """A lane of pinned memory whose copies run on ``stream``."""

    def __init__(self, stream: torch.cuda.Stream, nbytes: int) -> None:
        self.room = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._stream = stream
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """See ``Lane.send``."""
        with torch.cuda.stream(self._stream):
            for rows, staged in pairs:
                rows.copy_(staged, non_blocking=True)
            self._sent.record(self._stream)

    def wait(self) -> None:
        """See ``Lane.wait``."""
        self._sent.synchronize()


class StagedCopies:
    """Copies through lanes, by turns; see ``Copies``."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = tuple(lanes)

    def __call__(self, rows: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """As ``Copies`` says. Raises ValueError for a row longer than a lane."""
        turns = cycle(self._lanes)
        lane, used = next(turns), 0
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for into, value in self._pieces(rows, values):
                if used + into.nbytes > len(lane.room):
                    lane.send(pairs)
                    lane, used, pairs = next(turns), 0, []
                    lane.wait()
                staged = lane.room[used : used + into.nbytes].view(into.dtype).view(into.shape)
                pairs.append((into, staged.copy_(value)))
                used += -(-into.nbytes // _ALIGN) * _ALIGN
            lane.send(pairs)
        finally:
            for lane in self._lanes:
                lane.wait()

    def _pieces(
        self, rows: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The pairs, as many rows of each at once as fit a lane."""
        room = min(len(lane.room) for lane in self._lanes)
        for into, value in zip(rows, values, strict=True):
            if into.shape != value.shape:
                raise ValueError(f"{tuple(value.shape)} values for {tuple(into.shape)} rows")
            if not into.numel():
                continue
            row = into[0].nbytes
            if row > room:
                raise ValueError(f"a row of {row} bytes is longer than a lane's {room}")
            pieces = (torch.split(tensor, room // row) for tensor in (into, value))
            yield from zip(*pieces, strict=True)
