"""What the model's layers need to know of the step that is running."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch

from manyhats_kernels import AdapterBatch, AttentionBatch, StaticAdapterBatch


class StepState:
    """The running step's plan, shared by every adapted layer of one model. Set and read on the step
    thread.

    ``active_sites`` has bit i set where some worn adapter does something at site i; ``worn_slots``
    has bit s set where a token of the step wears slot s. Both are 0 in a step of base tokens alone,
    so that those pay for one test a layer. ``virtual`` holds (slot, begin, end, position) for the
    rows begin:end of the batch that are an adapter's virtual tokens from ``position`` on.
    """

    __slots__ = (
        "_adapters",
        "_attention",
        "_head",
        "_per_head",
        "_wanted",
        "active_sites",
        "virtual",
        "worn_slots",
    )

    def __init__(self) -> None:
        self._adapters: AdapterBatch | None = None
        self._attention: AttentionBatch | None = None
        self._wanted: np.ndarray | None = None
        self._head: AdapterBatch | None = None
        self._per_head: dict[tuple[torch.Size, int], AdapterBatch] = {}
        self.virtual: Sequence[tuple[int, int, int, int]] = ()
        self.active_sites = 0
        self.worn_slots = 0

    @property
    def adapters(self) -> AdapterBatch:
        """Who wears what. Raises RuntimeError outside a step."""
        if self._adapters is None:
            raise RuntimeError("no step is running")
        return self._adapters

    @property
    def attention(self) -> AttentionBatch:
        """Who attends where. Raises RuntimeError outside a step."""
        if self._attention is None:
            raise RuntimeError("no step is running")
        return self._attention

    @property
    def head(self) -> AdapterBatch:
        """Who wears what among the rows that meet the head. Made for the first who asks."""
        if self._head is None:
            adapters = self.adapters
            slots = adapters.slots.cpu().numpy()[self._wanted]
            self._head = AdapterBatch.build(slots, adapters.num_slots, adapters.slots.device)
        return self._head

    def per_head(self, shape: torch.Size, token_axis: int) -> AdapterBatch:
        """Who wears what among the rows of a [1, tokens, heads, n] tensor, in its own order.

        With ``token_axis`` 2 it is [1, heads, tokens, n]. Made once a step and shape.
        """
        batch = self._per_head.get((shape, token_axis))
        if batch is None:
            adapters = self.adapters
            if isinstance(adapters, StaticAdapterBatch):
                first = token_axis == 2
                rows = adapters.per_head(shape[1 if first else 2], heads_first=first)
                return cast(AdapterBatch, rows)
            slots = adapters.slots.cpu().numpy()
            slots = np.repeat(slots, shape[2]) if token_axis == 1 else np.tile(slots, shape[1])
            batch = AdapterBatch.build(slots, adapters.num_slots, adapters.slots.device)
            self._per_head[shape, token_axis] = batch
        return batch

    def begin(
        self,
        attention: AttentionBatch,
        adapters: AdapterBatch,
        sites_of_slot: Sequence[int],
        *,
        wanted: np.ndarray,
        virtual: Sequence[tuple[int, int, int, int]] = (),
    ) -> None:
        """Sets the next pass's plan. ``sites_of_slot[s]``: bitmask of slot s's sites; ``wanted``:
        the rows that meet the head, in order.
        """
        self._attention = attention
        self._adapters = adapters
        self._wanted = wanted
        self.virtual = virtual
        self.active_sites, self.worn_slots = _masks(adapters.worn, sites_of_slot)

    @contextmanager
    def static(self, attention: AttentionBatch, adapters: StaticAdapterBatch) -> Iterator[None]:
        """The running step of decodes, with its plans in static buffers, for a graph's capture.

        The masks stay as they are: they decide what is launched, and so what the graph holds. All
        rows of such a step meet the head, in order.
        """
        before = self._attention, self._adapters, self._head, self._per_head
        # A backend that can be captured takes static plans where others take plain ones.
        self._attention, self._adapters = attention, cast(AdapterBatch, adapters)
        self._head, self._per_head = self._adapters, {}
        try:
            yield
        finally:
            self._attention, self._adapters, self._head, self._per_head = before

    def end(self) -> None:
        """Forgets the plan."""
        self._attention = self._adapters = self._head = self._wanted = None
        self._per_head.clear()
        self.virtual = ()
        self.active_sites = self.worn_slots = 0


def _masks(worn: Iterable[int], sites_of_slot: Sequence[int]) -> tuple[int, int]:
    active = slots = 0
    for slot in worn:
        active |= sites_of_slot[slot]
        slots |= 1 << slot
    return active, slots


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A numpy array as a tensor on ``device``, without a copy on the CPU."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
