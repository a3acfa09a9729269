"""Embeddings: replaced rows, whole tables, low-rank products gathered by id, soft prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from manyhats.adapters.parts import SiteParts, SiteSpec
from manyhats.engine.hooks import Hook
from manyhats.engine.parts.site import PoolConfig, fields_of, nbytes, refuse_others
from manyhats.engine.step import StepState

_SERVED = frozenset({"low_rank", "dense", "rows", "soft_prompt"})


@dataclass(frozen=True, slots=True)
class _Own:
    """One slot's parts. ``a``: [ids, rank]; ``ids`` ascending."""

    dense: torch.Tensor | None
    ids: torch.Tensor | None
    vectors: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    soft_prompt: torch.Tensor | None


class EmbeddingSite:
    """The parts of one embedding, whole tensors by slot.

    A loop over the worn adapters that have parts here, all tokens of each at once.
    ``_looked_up``: bitmask of the slots that have more than a soft prompt.
    """

    __slots__ = ("_config", "_looked_up", "_own", "spec")

    def __init__(self, spec: SiteSpec, config: PoolConfig) -> None:
        self.spec = spec
        self._config = config
        self._own: dict[int, _Own] = {}
        self._looked_up = 0

    def check(self, parts: SiteParts) -> None:
        """See ``Site.check``."""
        refuse_others(parts, self.spec, _SERVED)

    def rows(self, parts: SiteParts) -> int:
        """See ``Site.rows``."""
        return 0

    def whole_bytes(self, parts: SiteParts) -> int:
        """See ``Site.whole_bytes``."""
        total = nbytes(parts.dense, parts.soft_prompt)
        if parts.rows is not None:
            total += nbytes(parts.rows.token_ids, parts.rows.vectors)
        if parts.low_rank is not None:
            total += nbytes(parts.low_rank.a, parts.low_rank.b)
        return total

    def launches(self, parts: SiteParts) -> frozenset[str] | None:
        """See ``Site.launches``: a soft prompt is there for virtual tokens alone."""
        return frozenset() if fields_of(parts) <= {"soft_prompt"} else None

    def write(self, slot: int, start: int, parts: SiteParts) -> None:
        """See ``Site.write``."""
        name, ids, hidden = self.spec.name, self.spec.in_features, self.spec.out_features
        place, low_rank, rows = self._config.place, parts.low_rank, parts.rows
        soft = parts.soft_prompt
        self._own[slot] = _Own(
            dense=place(parts.dense, (ids, hidden), f"dense of {name}")
            if parts.dense is not None
            else None,
            ids=rows.token_ids.to(self._config.device) if rows is not None else None,
            vectors=place(rows.vectors, (len(rows.token_ids), hidden), f"rows of {name}")
            if rows is not None
            else None,
            a=place(low_rank.a.T, (ids, low_rank.rank), f"low_rank.a of {name}")
            if low_rank is not None
            else None,
            b=place(low_rank.b, (low_rank.rank, hidden), f"low_rank.b of {name}")
            if low_rank is not None
            else None,
            soft_prompt=place(soft, (len(soft), hidden), f"soft_prompt of {name}")
            if soft is not None
            else None,
        )
        if self.launches(parts) is None:
            self._looked_up |= 1 << slot

    def clear(self, slot: int) -> None:
        """See ``Site.clear``."""
        self._own.pop(slot, None)
        self._looked_up &= ~(1 << slot)

    def apply(self, ids: torch.Tensor, y: torch.Tensor, state: StepState) -> None:
        """Changes the worn adapters' rows of y in place. ids: [T]; y: [T, hidden]."""
        batch = state.adapters
        for slot, begin, end in batch.segments if self._looked_up & state.worn_slots else ():
            own = self._own.get(slot)
            if own is not None:
                tokens = batch.order[begin:end].long()
                _look_up(own, ids.index_select(0, tokens), tokens, y)
        for slot, begin, end, position in state.virtual:
            own = self._own.get(slot)
            if own is not None and own.soft_prompt is not None:
                y[begin:end] = own.soft_prompt[position : position + end - begin]


def _look_up(own: _Own, ids: torch.Tensor, tokens: torch.Tensor, y: torch.Tensor) -> None:
    if own.dense is not None:
        y.index_copy_(0, tokens, own.dense.index_select(0, ids))
    if own.ids is not None and own.vectors is not None:
        at = torch.searchsorted(own.ids, ids).clamp_(max=len(own.ids) - 1)
        hit = own.ids[at] == ids
        y[tokens[hit]] = own.vectors[at[hit]]
    if own.a is not None and own.b is not None:
        d = own.a.index_select(0, ids).float() @ own.b.float()
        y.index_copy_(0, tokens, d.add_(y.index_select(0, tokens)).to(y.dtype))


class AdaptedEmbedding(Hook):
    """An embedding's forward with the adapters' parts."""

    __slots__ = ("_site",)

    def __init__(
        self, module: nn.Module, index: int, site: EmbeddingSite, state: StepState
    ) -> None:
        super().__init__(module, index, state)
        self._site = site

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [...] -> [..., hidden]."""
        y: torch.Tensor = self.base(ids)
        if self.state.active_sites & self.bit:
            self._site.apply(ids.reshape(-1), y.view(-1, y.shape[-1]), self.state)
        return y
