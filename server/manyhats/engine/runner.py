"""Runs one step: packs a schedule into tensors, sends it through the model, hands back the wanted
logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from manyhats.engine.model.load import BaseModel
from manyhats.engine.pool import AdapterPool
from manyhats.engine.step import StepState, to_device
from manyhats.types import Schedule, ScheduledSequence
from manyhats_kernels import AdapterBatch, AttentionBatch


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Logits of prompt positions: row i predicts token ``first + i + 1`` of the sequence. logits:
    [rows, V]; ``hidden`` [rows, H]: what the head made them of, for background sequences.
    """

    item: ScheduledSequence
    first: int
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepLogits:
    """``sampling``: [B, V], a row for each item of ``sampled`` in order; ``prompts`` for those who
    want them.
    """

    sampled: Sequence[ScheduledSequence]
    sampling: torch.Tensor
    prompts: Sequence[PromptRows]


class FastPath(Protocol):
    """A quicker way for steps of decodes and, where it ``takes_prompts``, for others too."""

    @property
    def takes_prompts(self) -> bool:
        """Whether steps with prompts in them are for it, and any rows of them wanted."""

    def takes(self, sequences: int) -> bool:
        """Whether it is for the running step, of so many sequences."""

    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        attention: AttentionBatch,
        adapters: AdapterBatch,
        wanted: np.ndarray,
    ) -> torch.Tensor | None:
        """Logits [rows, V] of the running step's rows ``wanted`` (in a step of decodes alone, all
        in order), valid until the next one; the plans lie on the CPU. None where it cannot be done.
        """


class ModelRunner:
    """The base model with its caches and pools, run on packed batches. Used by the step thread
    alone.
    """

    def __init__(
        self,
        base: BaseModel,
        pool: AdapterPool | None,
        state: StepState,
        block_size: int,
        fast: FastPath | None = None,
    ) -> None:
        self._module = base.module
        self._device = base.device
        self._pool = pool
        self._state = state
        self._block_size = block_size
        self._fast = fast

    @torch.inference_mode()
    def run(self, schedule: Schedule, *, by_modules: bool = False) -> StepLogits:
        """A forward pass over the schedule's tokens; logits in the model's dtype.

        Those of a captured step are valid until the next one. Two passes where background prompts
        would keep live decodes from the quicker way. ``by_modules``: by the model's own modules,
        with whatever somebody has put on them.
        """
        items, fast = schedule.items, None if by_modules else self._fast
        alone = fast is not None and not fast.takes_prompts
        live, background = _apart(items) if alone else (items, ())
        first = self._pass(live, fast)
        if not background:
            return first
        kept = first.sampling.clone()  # the second pass may write where it lies
        second = self._pass(background, fast)
        return StepLogits(
            [*first.sampled, *second.sampled],
            torch.cat([kept, second.sampling]) if second.sampled else kept,
            [*first.prompts, *second.prompts],
        )

    def _pass(self, items: Sequence[ScheduledSequence], fast: FastPath | None) -> StepLogits:
        counts = np.fromiter((i.count for i in items), np.int64, len(items))
        starts = np.fromiter((i.start for i in items), np.int64, len(items))
        ends = np.cumsum(counts)
        ids = np.fromiter(
            (t for i in items for t in i.sequence.token_ids[i.start : i.start + i.count]),
            np.int64,
            int(ends[-1]),
        )
        positions = np.arange(ids.size, dtype=np.int64) + np.repeat(
            starts - (ends - counts), counts
        )
        wanted, prompts = _wanted_rows(items, ends - counts, ends)
        decodes = ids.size == len(items) == wanted.size and not prompts
        hidden: list[torch.Tensor] = []
        seen = any(items[index].sequence.background for index, _, _ in prompts)
        if fast is not None and not (decodes or fast.takes_prompts):
            fast = None
        try:
            with _head_input(self._module, hidden) if seen else nullcontext():
                logits, planned = None, None
                if fast is not None:
                    planned = torch.device("cpu")
                    plans = self._begin(items, counts, starts, wanted, planned)
                    if fast.takes(len(items)):
                        logits = fast.run(ids, positions, *plans, wanted)
                if logits is None:
                    if planned != self._device:
                        self._begin(items, counts, starts, wanted, self._device)
                    logits = forward(
                        self._module,
                        to_device(ids, self._device)[None],
                        to_device(positions, self._device)[None],
                        to_device(wanted, self._device),
                    )
        finally:
            self._state.end()
        return _split(items, logits, prompts, hidden[0] if hidden else None)

    def _begin(
        self,
        items: Sequence[ScheduledSequence],
        counts: np.ndarray,
        starts: np.ndarray,
        wanted: np.ndarray,
        device: torch.device,
    ) -> tuple[AttentionBatch, AdapterBatch]:
        attention = AttentionBatch.build(
            counts,
            starts + counts,
            [i.sequence.block_ids for i in items],
            self._block_size,
            device,
        )
        slots = np.repeat(
            np.fromiter((i.sequence.slot for i in items), np.int64, len(items)), counts
        )
        num_slots = self._pool.slots if self._pool is not None else 0
        adapters = AdapterBatch.build(slots, num_slots, device)
        sites_of_slot = self._pool.sites_of_slot if self._pool is not None else ()
        virtual = _virtual_rows(items, np.cumsum(counts) - counts)
        self._state.begin(attention, adapters, sites_of_slot, wanted=wanted, virtual=virtual)
        return attention, adapters


def _apart(
    items: Sequence[ScheduledSequence],
) -> tuple[Sequence[ScheduledSequence], Sequence[ScheduledSequence]]:
    """(live items, background ones) where all of the live ones decode and not all of the others."""
    background = [item for item in items if item.sequence.background]
    if all(item.count == 1 for item in background):  # none at all, in nearly every step
        return items, ()
    live = [item for item in items if not item.sequence.background]
    if not live or any(item.count > 1 for item in live):
        return items, ()
    return live, background


def forward(
    module: nn.Module, ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """The logits [rows, V] of the rows ``wanted`` of a packed batch; ids and positions [1, T]."""
    logits: torch.Tensor = module(
        input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=wanted
    ).logits[0]
    return logits


@contextmanager
def _head_input(module: nn.Module, into: list[torch.Tensor]) -> Iterator[None]:
    """Adds what the output head is given to ``into``: [rows, H]."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, args: into.append(args[0].flatten(0, -2)))
    try:
        yield
    finally:
        hook.remove()


def _virtual_rows(
    items: Sequence[ScheduledSequence], begins: np.ndarray
) -> list[tuple[int, int, int, int]]:
    """Packed rows that are virtual tokens: (slot, begin, end, position of the first)."""
    rows = []
    for item, begin in zip(items, begins.tolist(), strict=True):
        count = min(item.sequence.virtual_tokens - item.start, item.count)
        if count > 0:
            rows.append((item.sequence.slot, begin, begin + count, item.start))
    return rows


def _wanted_rows(
    items: Sequence[ScheduledSequence], begins: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Packed rows that must meet the head: prompt rows first, then the sampling rows in order.

    The second value tells, for each item with prompt rows: (index of the item, first position, row
    count).
    """
    prompts: list[tuple[int, int, int]] = []
    rows: list[np.ndarray] = []
    for index, item in enumerate(items):
        if item.sequence.wants_prompt_logprobs:
            # Nothing scores a virtual token, nor the prompt's first one.
            before = item.sequence.virtual_tokens + item.sequence.scores_from - 1
            skipped = max(0, before - item.start)
            count = min(item.count, item.sequence.prompt_len - 1 - item.start) - skipped
            if count > 0:
                prompts.append((index, item.start + skipped, count))
                first = begins[index] + skipped
                rows.append(np.arange(first, first + count))
    samples = np.fromiter((i.samples for i in items), np.bool_, len(items))
    rows.append(ends[samples] - 1)
    return np.concatenate(rows), prompts


def _split(
    items: Sequence[ScheduledSequence],
    logits: torch.Tensor,
    prompts: Sequence[tuple[int, int, int]],
    hidden: torch.Tensor | None,
) -> StepLogits:
    offset = 0
    pieces: list[PromptRows] = []
    for index, first, count in prompts:
        rows = slice(offset, offset + count)
        states = hidden[rows] if hidden is not None else None
        pieces.append(PromptRows(items[index], first, logits[rows], states))
        offset += count
    return StepLogits([i for i in items if i.samples], logits[offset:], pieces)
