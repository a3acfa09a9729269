"""A step's tokens cut into tiles, as the grouped kernels read them; no triton is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats_kernels.batch import AdapterBatch

DECODE_TOKENS = 16
"""Tokens of a tile where segments are short: the smallest that a tensor core takes."""

PREFILL_TOKENS = 64
"""Tokens of a tile where a segment is longer than ``2 * DECODE_TOKENS``."""


@dataclass(frozen=True, eq=False)
class TokenTiles:
    """The tiles of a plan on its device.

    ``table``, int32 [tiles, 3], has (slot, begin, end) of each: the places ``begin:end`` of
    ``order``, at most ``tokens`` of them, all of one slot. (0, 0, 0) is a tile of nothing.
    """

    tokens: int
    order: Tensor  # int32 [places], token indices
    table: Tensor  # int32 [tiles, 3]

    @property
    def count(self) -> int:
        """Number of tiles, those of nothing included: the launch grid's first axis."""
        return self.table.shape[0]


def cut(segments: Sequence[tuple[int, int, int]], tokens: int) -> npt.NDArray[np.int32]:
    """(slot, begin, end) of the segments in pieces of at most ``tokens``: int32 [tiles, 3]."""
    edges = np.asarray(segments, np.int64).reshape(-1, 3)
    pieces = -(-(edges[:, 2] - edges[:, 1]) // tokens)
    segment = np.repeat(np.arange(len(edges)), pieces)
    within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = edges[segment, 1] + within * tokens
    table = np.stack(
        (edges[segment, 0], begin, np.minimum(begin + tokens, edges[segment, 2])), axis=1
    )
    return np.ascontiguousarray(table, dtype=np.int32)


def most_tiles(num_tokens: int, num_slots: int, tokens: int) -> int:
    """The most tiles that any plan of up to ``num_tokens`` tokens over ``num_slots`` slots has."""
    segments = min(num_tokens, num_slots)
    return segments + (num_tokens - segments) // tokens if segments else 0


def token_tiles(batch: AdapterBatch) -> TokenTiles:
    """The plan's tiles, of the size that its longest segment asks for."""
    tokens = PREFILL_TOKENS if batch.longest > 2 * DECODE_TOKENS else DECODE_TOKENS
    table = torch.from_numpy(cut(batch.segments, tokens))
    return TokenTiles(tokens, batch.order, table.to(batch.order.device, non_blocking=True))
