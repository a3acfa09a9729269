"""Attention over the paged cache: one object a layer, called by the model's attention module."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manyhats.engine.parts.prefix import PrefixSite
from manyhats.engine.step import StepState
from manyhats_kernels import Backend


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one layer's attention looks like. ``sliding_window`` in tokens, None: full."""

    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None


class PagedAttention:
    """Writes the step's keys and values into this layer's cache, then attends over it.

    ``k_cache`` and ``v_cache`` have the backend's own layout (``Backend.kv_cache_shape``).
    ``prefixes``: the adapters' own keys and values for their virtual tokens.
    """

    __slots__ = ("_backend", "_state", "k_cache", "prefixes", "v_cache")

    def __init__(
        self, backend: Backend, state: StepState, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        self._backend = backend
        self._state = state
        self.k_cache = k_cache
        self.v_cache = v_cache
        self.prefixes: PrefixSite | None = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query [1, H, T, D], key and value [1, KH, T, D] -> [1, T, H, D], in query's dtype."""
        batch = self._state.attention
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        if self._state.virtual and self.prefixes is not None:
            self.prefixes.apply(k, v, self._state)
        self._backend.store_kv(k, v, self.k_cache, self.v_cache, batch)
        out = self._backend.paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            batch,
            scale=scaling if scaling is not None else q.shape[-1] ** -0.5,
            sliding_window=sliding_window,
            soft_cap=softcap,
        )
        return out[None]
