"""Linear layers and the head: scales, biases, whole weights and replaced rows around the low-rank
product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from manyhats.adapters.parts import SiteKind, SiteParts, SiteSpec
from manyhats.engine.parts.site import PoolConfig, SlotVectors, fields_of, nbytes, refuse_others
from manyhats.engine.step import StepState
from manyhats_kernels import AdapterBatch
from manyhats_kernels.stack_parts import LinearParts

_SERVED = frozenset({"low_rank", "bias", "input_scale", "output_scale", "dense"})
_SERVED_HEAD = _SERVED | {"rows"}

LowRankProduct = Callable[[torch.Tensor, torch.Tensor, AdapterBatch, StepState], None]


class LinearExtras:
    """All that a linear site or the head has beside its low-rank product.

    ``slots``: bitmask of the slots with anything here.
    """

    __slots__ = (
        "_base_bias",
        "_bias",
        "_config",
        "_dense",
        "_input",
        "_output",
        "_rows",
        "_spec",
        "slots",
    )

    def __init__(self, spec: SiteSpec, config: PoolConfig) -> None:
        self._spec = spec
        self._config = config
        self._input = SlotVectors(config, spec.in_features, 1.0)
        self._output = SlotVectors(config, spec.out_features, 1.0)
        self._bias = SlotVectors(config, spec.out_features, -0.0)
        self._dense: dict[int, torch.Tensor] = {}
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._base_bias = (
            spec.bias.to(config.device, config.dtype) if spec.bias is not None else None
        )
        self.slots = 0

    def check(self, parts: SiteParts) -> None:
        """See ``Site.check``."""
        head = self._spec.kind is SiteKind.HEAD
        refuse_others(parts, self._spec, _SERVED_HEAD if head else _SERVED)

    def whole_bytes(self, parts: SiteParts) -> int:
        """See ``Site.whole_bytes``."""
        rows = parts.rows
        return nbytes(parts.dense) + (nbytes(rows.token_ids, rows.vectors) if rows else 0)

    def launches(self, parts: SiteParts) -> frozenset[str] | None:
        """See ``Site.launches``: whole weights and rows are taken one adapter at a time."""
        found = fields_of(parts)
        return None if found & {"dense", "rows"} else frozenset(found)

    def write(self, slot: int, parts: SiteParts) -> None:
        """See ``Site.write``."""
        spec, config = self._spec, self._config
        self._input.write(slot, parts.input_scale)
        self._output.write(slot, parts.output_scale)
        self._bias.write(slot, parts.bias)
        if parts.dense is not None:
            shape = (spec.out_features, spec.in_features)
            self._dense[slot] = config.place(parts.dense, shape, f"dense of {spec.name}")
        if parts.rows is not None:
            ids = parts.rows.token_ids.to(config.device)
            shape = (len(ids), spec.in_features)
            self._rows[slot] = ids, config.place(parts.rows.vectors, shape, f"rows of {spec.name}")
        vectors = self._input.slots | self._output.slots | self._bias.slots
        if vectors >> slot & 1 or slot in self._dense or slot in self._rows:
            self.slots |= 1 << slot

    def clear(self, slot: int) -> None:
        """See ``Site.clear``."""
        self.slots &= ~(1 << slot)
        for vectors in (self._input, self._output, self._bias):
            vectors.clear(slot)
        self._dense.pop(slot, None)
        self._rows.pop(slot, None)

    def run(
        self,
        base: Callable[[torch.Tensor], torch.Tensor],
        product: LowRankProduct,
        x: torch.Tensor,
        batch: AdapterBatch,
        state: StepState,
    ) -> torch.Tensor:
        """y = output_scale * (W (input_scale * x) + base's bias + product) + bias for each token.

        x: [..., in] -> [..., out]. x itself is not changed.
        """
        backend = self._config.backend
        flat = x.reshape(-1, self._spec.in_features)
        if self._input.worn(state):
            flat = flat.clone()
            backend.scale_rows(flat, self._input.values, batch)
        y = base(flat.view(x.shape))
        out = y.view(-1, self._spec.out_features)
        if self.replaces(state):
            self._replace(flat, out, batch)
        product(flat, out, batch, state)
        self.finish(out, batch, state)
        return y

    def before(self, state: StepState) -> bool:
        """Whether a worn adapter changes x or stands in for the weight: what ``finish`` cannot."""
        return self.scales_input(state) or self.replaces(state)

    @property
    def parts(self) -> LinearParts:
        """The vectors' pools as kernels take them."""
        return LinearParts(self._input.rows, self._output.rows, self._bias.rows)

    def scales_input(self, state: StepState) -> bool:
        """Whether a worn adapter changes x."""
        return self._input.worn(state)

    def replaces(self, state: StepState) -> bool:
        """Whether a worn adapter stands in for the weight or rows of it."""
        return any(state.worn_slots >> slot & 1 for slot in (*self._dense, *self._rows))

    def finish(self, y: torch.Tensor, batch: AdapterBatch, state: StepState) -> None:
        """The output's scale and bias, in place. y: [T, out]."""
        backend = self._config.backend
        if self._output.worn(state):
            backend.scale_rows(y, self._output.values, batch)
        if self._bias.worn(state):
            backend.bias_add(y, self._bias.values, batch)

    def _replace(self, x: torch.Tensor, y: torch.Tensor, batch: AdapterBatch) -> None:
        for slot, begin, end in batch.segments:
            dense, rows = self._dense.get(slot), self._rows.get(slot)
            if dense is None and rows is None:
                continue
            tokens = batch.order[begin:end].long()
            own, bias = x.index_select(0, tokens), self._base_bias
            if dense is not None:
                y.index_copy_(0, tokens, functional.linear(own, dense, bias))
            if rows is not None:
                ids, vectors = rows
                part = bias.index_select(0, ids) if bias is not None else None
                y[tokens[:, None], ids] = functional.linear(own, vectors, part)
