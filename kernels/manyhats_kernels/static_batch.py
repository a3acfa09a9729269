"""A plan in buffers that keep their addresses, for steps that are captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats_kernels.batch import AdapterBatch
from manyhats_kernels.triton.plan import DECODE_TOKENS, TokenTiles, cut, most_tiles


@dataclass(frozen=True, eq=False)
class StaticRows:
    """Who wears what among rows that a static plan's tokens were made into, a head a row say.

    For the operations that look at a row's slot alone: ``bias_add``, ``scale_rows``, ``norm_rows``.
    ``slots`` is int32 [rows], on the device.
    """

    slots: Tensor
    num_slots: int

    @property
    def num_tokens(self) -> int:
        """Number of rows."""
        return self.slots.shape[0]


class StaticAdapterBatch:
    """The device form of an :class:`AdapterBatch` of at most ``num_tokens`` tokens.

    Every tensor lies in one int32 buffer that is allocated once and has the size that the worst
    plan needs, so the launch grid depends on ``num_tokens`` and ``num_slots`` alone. What a plan
    leaves over is padding: tokens of the base (slot -1), empty segments, tiles of nothing;
    ``order`` is 0 there and nothing reads it. A new object holds the plan of base tokens alone.

    ``slots`` is int32 [num_tokens], ``order`` int32 [num_tokens], ``segment_slots`` int32
    [segments], ``segment_offsets`` int32 [segments + 1], ``tiles`` the grouped kernels' own form.
    Raises ValueError when ``num_tokens < 1`` or ``num_slots < 0``.
    """

    def __init__(self, num_tokens: int, num_slots: int, device: torch.device | str) -> None:
        if num_tokens < 1 or num_slots < 0:
            raise ValueError(
                f"num_tokens must be >= 1 and num_slots >= 0, got {num_tokens} and {num_slots}"
            )
        self.num_tokens = num_tokens
        self.num_slots = num_slots
        segments = min(num_tokens, num_slots)
        tiles = most_tiles(num_tokens, num_slots, DECODE_TOKENS)
        self._sizes = (num_tokens, num_tokens, segments, segments + 1, 3 * tiles)
        self._buffer = torch.empty(sum(self._sizes), dtype=torch.int32, device=device)
        self.slots, self.order, self.segment_slots, self.segment_offsets, table = self._parts(
            self._buffer
        )
        self.tiles = TokenTiles(DECODE_TOKENS, self.order, table.view(tiles, 3))
        self.fill([])

    def fill(self, slots: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Plan for tokens that wear ``slots`` (-1: none); those after them are of the base.

        Raises ValueError as :meth:`AdapterBatch.build` and :meth:`load` do.
        """
        self.load(AdapterBatch.build(slots, self.num_slots))

    def load(self, batch: AdapterBatch) -> None:
        """Take over a plan that was built on the CPU, by one copy that the host does not wait for.

        Work on the device's current stream that was queued before still sees the former plan.
        Raises ValueError, and changes nothing, when the plan has more tokens or slots than fit, or
        lies on another device than the CPU.
        """
        if batch.num_tokens > self.num_tokens:
            raise ValueError(f"num_tokens {batch.num_tokens} is over the {self.num_tokens} planned")
        if batch.num_slots > self.num_slots:
            raise ValueError(f"num_slots {batch.num_slots} is over the {self.num_slots} planned")
        if batch.slots.device.type != "cpu":
            raise ValueError(f"the plan must lie on the CPU, not on {batch.slots.device}")
        on_cuda = self._buffer.device.type == "cuda"
        # Fresh each time: the allocator reuses pinned memory only after the copy from it is done.
        staged = torch.zeros(sum(self._sizes), dtype=torch.int32, pin_memory=on_cuda)
        slots, order, segment_slots, offsets, table = (p.numpy() for p in self._parts(staged))
        slots.fill(-1)
        slots[: batch.num_tokens] = batch.slots.numpy()
        order[: batch.order.shape[0]] = batch.order.numpy()
        segment_slots[: len(batch.worn)] = batch.segment_slots.numpy()
        offsets.fill(batch.order.shape[0])
        offsets[: len(batch.worn) + 1] = batch.segment_offsets.numpy()
        tiles = cut(batch.segments, DECODE_TOKENS).reshape(-1)
        table[: tiles.size] = tiles
        self._buffer.copy_(staged, non_blocking=True)

    def per_head(self, heads: int, *, heads_first: bool) -> StaticRows:
        """The plan of ``heads`` rows a token; ``heads_first``: all tokens of a head together.

        Made on the device, without a wait.
        """
        shape = (heads, self.num_tokens) if heads_first else (self.num_tokens, heads)
        of_tokens = self.slots if heads_first else self.slots[:, None]
        return StaticRows(of_tokens.expand(shape).reshape(-1), self.num_slots)

    def _parts(self, buffer: Tensor) -> list[Tensor]:
        """The buffer's views: slots, order, segment_slots, segment_offsets, tiles."""
        ends = np.cumsum(self._sizes).tolist()
        return [buffer[end - size : end] for size, end in zip(self._sizes, ends, strict=True)]


def any_worn(batch: AdapterBatch | StaticAdapterBatch | StaticRows) -> bool:
    """Whether a token may wear an adapter: of a static plan the host does not know."""
    return not isinstance(batch, AdapterBatch) or bool(batch.segments)
