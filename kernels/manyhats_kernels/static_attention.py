"""A decode step's attention plan in buffers that keep their addresses, for CUDA graphs."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from manyhats_kernels.batch import AttentionBatch


@runtime_checkable
class Capturable(Protocol):
    """A backend whose launches wait for nothing and take static plans: it can be captured."""

    @property
    def takes_static_plans(self) -> bool:
        """Whether ``StaticAttentionBatch.batch`` and ``StaticAdapterBatch`` may be given to it."""


class StaticAttentionBatch:
    """The device form of an :class:`AttentionBatch` of at most ``num_sequences`` single tokens.

    ``batch`` is the plan that the backend is given, also while a graph is captured: its tensors
    are allocated once, and its host fields say what the largest plan could need, so launch grids
    depend on the sizes given here alone. What a plan leaves over is padding: sequences of context
    0, whose output nobody reads and whose token has no place in the cache (-1). A new object holds
    padding alone. Raises ValueError, naming the size, when one is less than 1.
    """

    def __init__(
        self,
        num_sequences: int,
        max_blocks: int,
        block_size: int,
        cache_blocks: int,
        device: torch.device | str,
    ) -> None:
        for name, size in (
            ("num_sequences", num_sequences),
            ("max_blocks", max_blocks),
            ("block_size", block_size),
            ("cache_blocks", cache_blocks),
        ):
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=device)
        contexts = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        tables = torch.full((num_sequences, max_blocks), -1, dtype=torch.int32, device=device)
        places = torch.full((num_sequences,), -1, dtype=torch.int64, device=device)
        self.batch = AttentionBatch(
            num_tokens=num_sequences,
            num_sequences=num_sequences,
            block_size=block_size,
            query_start=starts,
            context_lens=contexts,
            block_tables=tables,
            slot_mapping=places,
            host_query_lens=(1,) * num_sequences,
            host_query_start=tuple(range(num_sequences + 1)),
            host_context_lens=(max_blocks * block_size,) * num_sequences,
            max_query_len=1,
            max_context_len=max_blocks * block_size,
            max_block=cache_blocks - 1,
            pointers=(
                starts.data_ptr(),
                contexts.data_ptr(),
                tables.data_ptr(),
                places.data_ptr(),
            ),
        )

    def load(self, plan: AttentionBatch) -> None:
        """Take over a plan built on the CPU, by copies that the host does not wait for.

        Work that was queued before on the device's current stream still sees the former plan.
        Raises ValueError, and changes nothing, for a plan with more than one new token a sequence,
        one that does not fit, or one that lies on another device than the CPU.
        """
        self._check(plan)
        own, count, blocks = self.batch, plan.num_sequences, plan.block_tables.shape[1]
        pinned = own.context_lens.device.type == "cuda"
        # Fresh each time: the allocator reuses pinned memory only after the copy from it is done.
        contexts = torch.zeros(own.num_sequences, dtype=torch.int32, pin_memory=pinned)
        contexts[:count] = plan.context_lens
        places = torch.full((own.num_sequences,), -1, dtype=torch.int64, pin_memory=pinned)
        places[:count] = plan.slot_mapping
        tables = torch.empty((count, blocks), dtype=torch.int32, pin_memory=pinned)
        tables.copy_(plan.block_tables)
        own.context_lens.copy_(contexts, non_blocking=True)
        own.slot_mapping.copy_(places, non_blocking=True)
        # the rest of the tables is of plans before; no context reaches it
        own.block_tables[:count, :blocks].copy_(tables, non_blocking=True)

    def _check(self, plan: AttentionBatch) -> None:
        own = self.batch
        if plan.max_query_len > 1:
            raise ValueError(f"a sequence has {plan.max_query_len} new tokens, only 1 is planned")
        for name, size, limit in (
            ("num_sequences", plan.num_sequences, own.num_sequences),
            ("max_blocks", plan.block_tables.shape[1], own.block_tables.shape[1]),
            ("max_block", plan.max_block, own.max_block),
        ):
            if size > limit:
                raise ValueError(f"{name} {size} is over the {limit} planned")
        if plan.block_size != own.block_size:
            raise ValueError(f"block_size {plan.block_size} is not the {own.block_size} planned")
        if plan.context_lens.device.type != "cpu":
            raise ValueError(f"the plan must lie on the CPU, not on {plan.context_lens.device}")
