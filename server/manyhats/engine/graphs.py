"""Decode steps as CUDA graphs: one launch by the host instead of some thousand.

A graph is captured for a batch size and for what its layers launch: the parts that some worn
adapter has, site by site. Steps run eagerly if a worn adapter has parts that the host takes one
adapter at a time (``LaunchTable``). What changes from step to step, ids, positions,
attention and adapters, lies in buffers that the graph reads; a step of fewer sequences than the
size is padded.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from manyhats.engine.launches import LaunchTable
from manyhats.engine.step import StepState
from manyhats_kernels import AdapterBatch, AttentionBatch, StaticAdapterBatch, StaticAttentionBatch

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that are captured, up to the largest step of decodes."""

CAPTURE_AFTER = 8
"""Eager steps of a kind before it is captured: capturing costs about two of them, once."""

MAX_GRAPHS = 64
"""Graphs that are kept; the least recently used one gives way."""

MAX_KINDS = 4096
"""Kinds of steps that are counted; over it counting begins anew."""

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""ids [1, T], positions [1, T], wanted rows [T] -> logits [T, V]."""

Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""Captures a computation: how to do it again, and the tensor that then holds its result."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What the static buffers must hold. ``max_blocks``: cache blocks of the longest context."""

    max_num_seqs: int
    max_blocks: int
    block_size: int
    cache_blocks: int
    slots: int


class CudaCapture:
    """Captures on the current device; all graphs share one memory pool, as no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, compute: Callable[[], torch.Tensor]
    ) -> tuple[Callable[[], None], torch.Tensor]:
        """Runs once outside a graph, so that kernels are compiled and workspaces there."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = compute()
        return graph.replay, out


class _Buffers:
    """The inputs of the graphs of one size."""

    def __init__(self, size: int, shape: GraphShape, device: torch.device) -> None:
        self.tokens = torch.zeros((2, 1, size), dtype=torch.int64, device=device)
        self.wanted = torch.arange(size, device=device)
        self.attention = StaticAttentionBatch(
            size, shape.max_blocks, shape.block_size, shape.cache_blocks, device
        )
        self.adapters = StaticAdapterBatch(size, shape.slots, device)

    def load(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        attention: AttentionBatch,
        adapters: AdapterBatch,
    ) -> None:
        """Takes over a step; the host does not wait."""
        pinned = self.tokens.device.type == "cuda"
        staged = torch.zeros(self.tokens.shape, dtype=torch.int64, pin_memory=pinned)
        staged[0, 0, : ids.size] = torch.from_numpy(ids)
        staged[1, 0, : ids.size] = torch.from_numpy(positions)
        self.tokens.copy_(staged, non_blocking=True)
        self.attention.load(attention)
        self.adapters.load(adapters)


class DecodeGraphs:
    """The captured decode steps of one model. Used by the step thread alone."""

    def __init__(
        self,
        forward: Forward,
        shape: GraphShape,
        state: StepState,
        device: torch.device,
        capture: Capture,
        launches: LaunchTable,
    ) -> None:
        self._forward = forward
        self._launches = launches
        self._shape = shape
        self._state = state
        self._device = device
        self._capture = capture
        self._sizes = tuple(s for s in SIZES if s <= shape.max_num_seqs)
        self._buffers: dict[int, _Buffers] = {}
        self._seen: Counter[tuple[int, int]] = Counter()
        self._graphs: OrderedDict[tuple[int, int], tuple[Callable[[], None], torch.Tensor]] = (
            OrderedDict()
        )
        self._off = False

    @property
    def takes_prompts(self) -> bool:
        """A graph holds a decode step."""
        return False

    def takes(self, sequences: int) -> bool:
        """Whether a decode step of this kind is, or is now due to be, a graph."""
        if self._off or not self._sizes or sequences > self._sizes[-1]:
            return False
        key = self._key(sequences)
        if key is None:
            return False
        if key in self._graphs:
            return True
        if len(self._seen) > MAX_KINDS:
            self._seen.clear()
        self._seen[key] += 1
        return self._seen[key] > CAPTURE_AFTER

    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        attention: AttentionBatch,
        adapters: AdapterBatch,
        wanted: np.ndarray,
    ) -> torch.Tensor | None:
        """Logits [T, V] of a decode step, valid until the next one; plans are on the CPU.

        The step must have begun with the same plans, and be one that ``takes`` takes (ValueError).
        None, once and for all, when a step cannot be captured: the model does something that a
        graph cannot hold, which is logged.
        """
        size, key = self._size(ids.size), self._key(ids.size)
        if key is None:
            raise ValueError("no graph can hold the running step")
        buffers = self._buffers.get(size)
        if buffers is None:
            buffers = self._buffers[size] = _Buffers(size, self._shape, self._device)
        buffers.load(ids, positions, attention, adapters)
        graph = self._graphs.get(key)
        if graph is None:
            try:
                graph = self._captured(buffers)
            except RuntimeError as error:
                self._off = True
                logger.warning("decode steps run without CUDA graphs: %s", error)
                return None
            self._keep(key, graph)
        self._graphs.move_to_end(key)
        replay, logits = graph
        replay()
        return logits[: ids.size]

    def _captured(self, buffers: _Buffers) -> tuple[Callable[[], None], torch.Tensor]:
        ids, positions = buffers.tokens
        with self._state.static(buffers.attention.batch, buffers.adapters):
            return self._capture(lambda: self._forward(ids, positions, buffers.wanted))

    def _keep(self, key: tuple[int, int], graph: tuple[Callable[[], None], torch.Tensor]) -> None:
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            gone, _ = self._graphs.popitem(last=False)
            del self._seen[gone]

    def _key(self, sequences: int) -> tuple[int, int] | None:
        """The graph's size and what its layers launch; None where no graph can hold that."""
        launches = self._launches.of(self._state)
        return None if launches is None else (self._size(sequences), launches)

    def _size(self, sequences: int) -> int:
        return next(s for s in self._sizes if sequences <= s)
