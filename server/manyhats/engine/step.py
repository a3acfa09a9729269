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
    so that those pay for one test a layer.
    """

    __slots__ = ("_adapters", "_attention", "active_sites", "worn_slots")

    def __init__(self) -> None:
        self._adapters: AdapterBatch | None = None
        self._attention: AttentionBatch | None = None
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

    def begin(
        self, attention: AttentionBatch, adapters: AdapterBatch, sites_of_slot: Sequence[int]
    ) -> None:
        """Sets the next pass's plan. ``sites_of_slot[s]``: bitmask of slot s's sites."""
        self._attention = attention
        self._adapters = adapters
        self.active_sites, self.worn_slots = _masks(adapters.worn, sites_of_slot)

    @contextmanager
    def static(self, attention: AttentionBatch, adapters: StaticAdapterBatch) -> Iterator[None]:
        """The running step with its plans in static buffers, for the capture of a graph.

        The masks stay as they are: they decide what is launched, and so what the graph holds.
        """
        before = self._attention, self._adapters
        # A backend that can be captured takes static plans where others take plain ones.
        self._attention, self._adapters = attention, cast(AdapterBatch, adapters)
        try:
            yield
        finally:
            self._attention, self._adapters = before

    def end(self) -> None:
        """Forgets the plan."""
        self._attention = self._adapters = None
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
