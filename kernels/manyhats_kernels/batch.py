"""Plans of a step: which token wears which adapter, which cache blocks each sequence attends to.

A plan is built once a step, on the host, and used by every layer. Whatever a launcher wants to know
on the host stands in it as plain Python, so that no layer ever waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


def _int_array(values: Sequence[int] | npt.NDArray[np.integer], name: str) -> IntArray:
    """``values`` as a one-dimensional int64 array, or ValueError naming ``name``."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got {array.ndim} dimensions")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    return array.astype(np.int64, copy=False)


def _to_device(array: npt.NDArray[np.integer], dtype: type, device: torch.device) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


class Planned(Protocol):
    """What the checks want to know of a plan, whichever form it has."""

    @property
    def num_tokens(self) -> int:
        """Rows that the batch's tensors have."""

    @property
    def num_slots(self) -> int:
        """Slots that the plan may name: ``0:num_slots``."""


@dataclass(frozen=True, eq=False)
class AdapterBatch:
    """Which token of the packed batch wears the adapter of which slot.

    The tokens that wear an adapter are sorted by slot (stably), so that each worn slot is one
    segment of ``order``: segment ``i`` holds ``order[segment_offsets[i]:segment_offsets[i + 1]]``.
    A token of the bare base model has slot -1 and no place in ``order``. ``segments``, ``worn`` and
    ``longest`` mirror the tensors on the host; ``pointers`` are the addresses of ``order``,
    ``segment_slots`` and ``segment_offsets`` for launchers of native code.
    """

    num_tokens: int
    num_slots: int
    slots: Tensor  # int32 [T], -1 = base
    order: Tensor  # int32 [N], token indices
    segment_slots: Tensor  # int32 [S]
    segment_offsets: Tensor  # int32 [S + 1], into order
    worn: tuple[int, ...]  # distinct slots, ascending: segment_slots on the host
    segments: tuple[tuple[int, int, int], ...]  # (slot, begin, end) into order
    longest: int  # tokens of the longest segment, 0 when no token wears an adapter
    pointers: tuple[int, int, int]

    @classmethod
    def build(
        cls,
        slots: Sequence[int] | npt.NDArray[np.integer],
        num_slots: int,
        device: torch.device | str = "cpu",
    ) -> AdapterBatch:
        """Plan a batch whose token ``t`` wears slot ``slots[t]`` (-1: none), for ``device``.

        No token at all, and no token with an adapter, are both legal. Raises ValueError when a slot
        is outside ``[-1, num_slots)`` or ``slots`` is not a flat run of integers.
        """
        host = _int_array(slots, "slots")
        if num_slots < 0:
            raise ValueError(f"num_slots must be >= 0, got {num_slots}")
        if host.size and (int(host.min()) < -1 or int(host.max()) >= num_slots):
            at = int(np.argmax((host < -1) | (host >= num_slots)))
            raise ValueError(f"slots[{at}] = {int(host[at])} is outside [-1, {num_slots})")
        order = np.argsort(host, kind="stable")[int((host == -1).sum()) :]
        by_slot = host[order]
        starts = np.flatnonzero(np.diff(by_slot, prepend=-1))
        offsets = np.append(starts, order.size)
        worn, edges = by_slot[starts].tolist(), offsets.tolist()
        on = torch.device(device)
        tensors = (
            _to_device(order, np.int32, on),
            _to_device(by_slot[starts], np.int32, on),
            _to_device(offsets, np.int32, on),
        )
        return cls(
            num_tokens=int(host.size),
            num_slots=num_slots,
            slots=_to_device(host, np.int32, on),
            order=tensors[0],
            segment_slots=tensors[1],
            segment_offsets=tensors[2],
            worn=tuple(worn),
            segments=tuple(zip(worn, edges[:-1], edges[1:], strict=True)),
            longest=int(np.diff(offsets).max(initial=0)),
            pointers=(tensors[0].data_ptr(), tensors[1].data_ptr(), tensors[2].data_ptr()),
        )


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Which rows of the packed batch belong to which sequence, and where its cache lies.

    Sequence ``i`` brings the tokens ``query_start[i]:query_start[i + 1]`` of the batch; they are
    the last ones of its ``context_lens[i]`` positions, whose keys and values lie in the cache
    blocks ``block_tables[i]`` in order. Sequences may stand in any order. The ``host_*`` fields and
    the maxima mirror the tensors on the host; ``pointers`` are the addresses of ``query_start``,
    ``context_lens``, ``block_tables`` and ``slot_mapping``.
    """

    num_tokens: int
    num_sequences: int
    block_size: int
    query_start: Tensor  # int32 [S + 1]
    context_lens: Tensor  # int32 [S], all keys, the step's new tokens included
    block_tables: Tensor  # int32 [S, max_blocks], padded with -1
    slot_mapping: Tensor  # int64 [T], block * block_size + offset of each new token
    host_query_lens: tuple[int, ...]
    host_query_start: tuple[int, ...]
    host_context_lens: tuple[int, ...]
    max_query_len: int
    max_context_len: int
    max_block: int  # the largest block id in block_tables, -1 if none
    pointers: tuple[int, int, int, int]

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int] | npt.NDArray[np.integer],
        context_lens: Sequence[int] | npt.NDArray[np.integer],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """Plan attention: ``query_lens[i]`` new tokens of sequence i, ``context_lens[i]`` in all.

        ``block_tables[i]`` lists the blocks of sequence i, at least enough for its context; what is
        more than enough is kept but never read. Raises ValueError, naming the sequence, when the
        lengths disagree, a query is empty or longer than its context, a table is too short, or a
        block id that is needed is negative.
        """
        query, context = (
            _int_array(query_lens, "query_lens"),
            _int_array(context_lens, "context_lens"),
        )
        lengths = np.fromiter((len(t) for t in block_tables), np.int64, len(block_tables))
        _check_lengths(query, context, lengths, block_size)
        tables, used = _padded(block_tables, lengths, -(-context // block_size))
        start = np.zeros(query.size + 1, np.int64)
        np.cumsum(query, out=start[1:])
        sequence = np.repeat(np.arange(query.size), query)
        position = np.arange(int(start[-1])) + (context - query - start[:-1])[sequence]
        block = tables[sequence, position // block_size].astype(np.int64)
        on = torch.device(device)
        tensors = (
            _to_device(start, np.int32, on),
            _to_device(context, np.int32, on),
            _to_device(tables, np.int32, on),
            _to_device(block * block_size + position % block_size, np.int64, on),
        )
        return cls(
            num_tokens=int(start[-1]),
            num_sequences=int(query.size),
            block_size=block_size,
            query_start=tensors[0],
            context_lens=tensors[1],
            block_tables=tensors[2],
            slot_mapping=tensors[3],
            host_query_lens=tuple(query.tolist()),
            host_query_start=tuple(start.tolist()),
            host_context_lens=tuple(context.tolist()),
            max_query_len=int(query.max(initial=0)),
            max_context_len=int(context.max(initial=0)),
            max_block=int(tables[used].max(initial=-1)),
            pointers=(
                tensors[0].data_ptr(),
                tensors[1].data_ptr(),
                tensors[2].data_ptr(),
                tensors[3].data_ptr(),
            ),
        )


def _padded(
    block_tables: Sequence[Sequence[int]], lengths: IntArray, needed: IntArray
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """The tables as one array padded with -1, and which of its entries a context needs."""
    tables = np.full((lengths.size, int(lengths.max(initial=0))), -1, np.int32)
    if tables.size:
        flat = np.concatenate([np.asarray(t, np.int32) for t in block_tables if len(t)])
        tables[np.arange(tables.shape[1]) < lengths[:, None]] = flat
    used = np.arange(tables.shape[1]) < needed[:, None]
    if (tables[used] < 0).any():
        at = int(np.argmax(((tables < 0) & used).any(axis=1)))
        raise ValueError(f"block_tables[{at}] has a negative block id within its context")
    return tables, used


def _check_lengths(query: IntArray, context: IntArray, tables: IntArray, block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    if not query.size == context.size == tables.size:
        raise ValueError(
            "query_lens, context_lens and block_tables must agree on the number of sequences, got "
            f"{query.size}, {context.size} and {tables.size}"
        )
    for bad, what in (
        (query < 1, "query_lens must be >= 1"),
        (context < query, "context_lens must be >= query_lens"),
        (tables * block_size < context, "block_tables must cover context_lens"),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                f"{what}: sequence {at} has query_len {int(query[at])}, context_len "
                f"{int(context[at])} and {int(tables[at])} blocks of {block_size}"
            )
