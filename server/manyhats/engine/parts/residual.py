"""The residual stream: bottlenecks after attention and after the mlp, one after the other or fused.

A layer adds its block's output o to the stream r. Everything here is done to o: what the layer adds
afterwards is o with the bottlenecks' output in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from manyhats.adapters.parts import Activation, Bottleneck, Fusion, SiteParts, SiteSpec
from manyhats.engine.hooks import Hook
from manyhats.engine.parts.fusion import PlacedFusion
from manyhats.engine.parts.site import PoolConfig, nbytes, refuse_others
from manyhats.engine.step import StepState
from manyhats.errors import AdapterLoadError
from manyhats_kernels import ACTIVATIONS, GATED, AdapterBatch, SiteRows
from manyhats_kernels.stack_parts import (
    ROUND_ALONE,
    ROUND_OF_OUTPUT,
    ROUND_PARALLEL,
    BottleneckRound,
)

_SERVED = frozenset({"bottlenecks", "fusion"})
_KINDS = {
    Activation.RELU: "relu",
    Activation.GELU: "gelu",
    Activation.GELU_TANH: "gelu_tanh",
    Activation.SILU: "silu",
    Activation.TANH: "tanh",
    Activation.LEAKY_RELU: "leaky_relu",
    Activation.IDENTITY: "identity",
}


class _Flag:
    """Which slots have a property: as a bitmask on the host and as a tensor on the device."""

    __slots__ = ("_of_slot", "slots")

    def __init__(self, config: PoolConfig) -> None:
        self._of_slot = torch.zeros(config.slots, dtype=torch.bool, device=config.device)
        self.slots = 0

    def set(self, slot: int, value: bool) -> None:
        self._of_slot[slot] = value
        self.slots = self.slots | 1 << slot if value else self.slots & ~(1 << slot)

    def of_tokens(self, batch: AdapterBatch) -> torch.Tensor:
        """[T, 1]; of no meaning for tokens of the base."""
        return self._of_slot[batch.slots.clamp(min=0)][:, None]


class _Round:
    """The n-th bottleneck of every slot: all that are worn run in one call."""

    __slots__ = ("alone", "flags", "kinds", "of_output", "parallel", "rows", "slots")

    def __init__(self, config: PoolConfig) -> None:
        zeros = [torch.zeros(config.slots, dtype=torch.int32, device=config.device) for _ in "abcd"]
        self.rows = SiteRows(zeros[0], zeros[1])
        self.kinds, self.flags = zeros[2:]
        self.parallel, self.of_output, self.alone = (_Flag(config) for _ in range(3))
        self.slots = 0

    def write(self, slot: int, start: int, bottleneck: Bottleneck) -> None:
        self.rows.start[slot] = start
        self.rows.count[slot] = _rows(bottleneck)
        kind = ACTIVATIONS.index(_KINDS[bottleneck.activation])
        self.kinds[slot] = kind + (GATED if bottleneck.gate is not None else 0)
        self.parallel.set(slot, bottleneck.parallel)
        self.of_output.set(slot, bottleneck.of_output)
        self.alone.set(slot, not bottleneck.skip)
        self.flags[slot] = (
            ROUND_PARALLEL * bottleneck.parallel
            | ROUND_OF_OUTPUT * bottleneck.of_output
            | ROUND_ALONE * (not bottleneck.skip)
        )
        self.slots |= 1 << slot

    def clear(self, slot: int) -> None:
        if self.slots >> slot & 1:
            self.slots &= ~(1 << slot)
            self.rows.count[slot] = 0
            for flag in (self.parallel, self.of_output, self.alone):
                flag.set(slot, False)

    def reads(
        self, stream: torch.Tensor, out: torch.Tensor, batch: AdapterBatch, worn: int
    ) -> torch.Tensor:
        """What each token's bottleneck is given: [T, hidden], not sharing memory with ``out``."""
        x = stream + out
        if self.parallel.slots & worn:
            x = torch.where(self.parallel.of_tokens(batch), stream, x)
        if self.of_output.slots & worn:
            x = torch.where(self.of_output.of_tokens(batch), out, x)
        return x


class ResidualSite:
    """One residual site's bottlenecks: ``down`` and ``up`` are paged by rank rows as A and B are.

    A bottleneck takes one row more than its width: its gate in ``down``, its bias in ``up``
    (``Backend.bottleneck_add``). The pools come into being with the first adapter that needs them.
    """

    __slots__ = ("_bias", "_config", "_down", "_fused", "_fusions", "_rounds", "_up", "spec")

    def __init__(self, spec: SiteSpec, config: PoolConfig) -> None:
        self.spec = spec
        self._config = config
        self._rounds: list[_Round] = []
        self._fused: list[_Round] = []
        self._fusions: dict[int, PlacedFusion] = {}
        empty = torch.empty((0, spec.in_features), dtype=config.dtype, device=config.device)
        self._down = self._up = empty
        self._bias = torch.empty(0, device=config.device)

    def check(self, parts: SiteParts) -> None:
        """See ``Site.check``."""
        refuse_others(parts, self.spec, _SERVED)
        for index, one in enumerate(parts.bottlenecks):
            at = f"bottlenecks[{index}] of {self.spec.name}"
            hidden = self.spec.in_features
            if one.down.shape != one.up.shape or one.down.shape[1:] != (hidden,):
                raise AdapterLoadError(
                    f"{at}: down {tuple(one.down.shape)} and up {tuple(one.up.shape)} must both "
                    f"be [width, {hidden}]"
                )
            if one.parallel and one.of_output:
                raise AdapterLoadError(f"{at}: parallel and of_output exclude each other")
            if parts.fusion is not None and not one.skip:
                raise AdapterLoadError(f"{at}: without skip it cannot be fused")
        if parts.fusion is not None and not parts.bottlenecks:
            raise AdapterLoadError(f"{self.spec.name}: fusion has no bottlenecks")

    def rows(self, parts: SiteParts) -> int:
        """See ``Site.rows``."""
        return sum(_rows(b) for b in parts.bottlenecks)

    def whole_bytes(self, parts: SiteParts) -> int:
        """See ``Site.whole_bytes``."""
        f = parts.fusion
        return nbytes(f.query, f.key, f.value, f.query_bias, f.key_bias) if f is not None else 0

    def launches(self, parts: SiteParts) -> frozenset[str] | None:
        """See ``Site.launches``: the fusion of bottlenecks is made one adapter at a time."""
        if parts.fusion is not None:
            return None
        names = set()
        for index, one in enumerate(parts.bottlenecks):
            flags = {"added": True, "parallel": one.parallel, "of_output": one.of_output}
            flags["alone"] = not one.skip
            names |= {f"bottleneck {index} {name}" for name, there in flags.items() if there}
        return frozenset(names)

    def write(self, slot: int, start: int, parts: SiteParts) -> None:
        """See ``Site.write``."""
        self._make_pools()
        rounds = self._fused if parts.fusion is not None else self._rounds
        for index, one in enumerate(parts.bottlenecks):
            if index == len(rounds):
                rounds.append(_Round(self._config))
            self._copy(start, one)
            rounds[index].write(slot, start, one)
            start += _rows(one)
        if parts.fusion is not None:
            self._fusions[slot] = self._place(parts.fusion, len(parts.bottlenecks))

    def clear(self, slot: int) -> None:
        """See ``Site.clear``."""
        for one in (*self._rounds, *self._fused):
            one.clear(slot)
        self._fusions.pop(slot, None)

    @property
    def rounds(self) -> list[BottleneckRound]:
        """The bottlenecks that are not fused, as kernels take them."""
        pools = self._down, self._up, self._bias
        return [BottleneckRound(*pools, one.rows, one.kinds, one.flags) for one in self._rounds]

    def fuses(self, state: StepState) -> bool:
        """Whether a worn adapter's bottlenecks are fused here."""
        return any(one.slots & state.worn_slots for one in self._fused)

    def apply(self, stream: torch.Tensor, out: torch.Tensor, state: StepState) -> None:
        """Changes the block's output in place. stream, out: [T, hidden]."""
        batch, worn = state.adapters, state.worn_slots
        for one in self._rounds:
            if one.slots & worn:
                x = one.reads(stream, out, batch, worn)
                if one.alone.slots & worn:
                    mine = one.alone.of_tokens(batch) & (batch.slots >= 0)[:, None]
                    out.copy_(torch.where(mine, -stream, out))
                self._add(out, x, one, batch)
        if self.fuses(state):
            self._fuse(stream, out, batch, worn)

    def _add(self, y: torch.Tensor, x: torch.Tensor, one: _Round, batch: AdapterBatch) -> None:
        self._config.backend.bottleneck_add(
            y, x, self._down, self._up, self._bias, one.kinds, one.rows, batch
        )

    def _fuse(
        self, stream: torch.Tensor, out: torch.Tensor, batch: AdapterBatch, worn: int
    ) -> None:
        given, made = [], []
        for one in self._fused:
            given.append(one.reads(stream, out, batch, worn))
            made.append(torch.zeros_like(out))
            self._add(made[-1], given[-1], one, batch)
        for slot, begin, end in batch.segments:
            fusion = self._fusions.get(slot)
            if fusion is not None:
                tokens = batch.order[begin:end].long()
                x = given[fusion.count - 1].index_select(0, tokens)
                d = torch.stack([m.index_select(0, tokens) for m in made[: fusion.count]], 1)
                y = out.index_select(0, tokens).float() + fusion(x, d).float()
                out.index_copy_(0, tokens, y.to(out.dtype))

    def _make_pools(self) -> None:
        if not len(self._down):
            rows, hidden = self._config.rows, self.spec.in_features
            self._down = self._down.new_empty((rows, hidden))
            self._up = self._up.new_empty((rows, hidden))
            self._bias = self._bias.new_empty(rows)

    def _copy(self, start: int, one: Bottleneck) -> None:
        last = start + len(one.down)
        self._down[start:last].copy_(one.down)
        self._up[start:last].copy_(one.up)
        _copy_or_zero(self._bias[start:last], one.down_bias)
        _copy_or_zero(self._down[last], one.gate)
        _copy_or_zero(self._up[last], one.up_bias)
        self._bias[last] = one.gate_bias

    def _place(self, fusion: Fusion, count: int) -> PlacedFusion:
        n, name, place = self.spec.in_features, self.spec.name, self._config.place

        def placed(field: str, *shape: int) -> torch.Tensor | None:
            tensor = getattr(fusion, field)
            return None if tensor is None else place(tensor, shape, f"fusion.{field} of {name}")

        return PlacedFusion(
            query=place(fusion.query, (n, n), f"fusion.query of {name}"),
            key=place(fusion.key, (n, n), f"fusion.key of {name}"),
            value=placed("value", n, n),
            query_bias=placed("query_bias", n),
            key_bias=placed("key_bias", n),
            temperature=fusion.temperature,
            count=count,
        )


def _rows(bottleneck: Bottleneck) -> int:
    return len(bottleneck.down) + 1


def _copy_or_zero(target: torch.Tensor, source: torch.Tensor | None) -> None:
    if source is None:
        target.zero_()
    else:
        target.copy_(source)


class StreamIn:
    """The stream on its way from where it enters a block to where the block's output leaves it."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None


class BlockEntry(Hook):
    """The norm at a block's entry: keeps the stream for the block's exit."""

    __slots__ = ("_kept",)

    def __init__(self, module: nn.Module, index: int, kept: StreamIn, state: StepState) -> None:
        super().__init__(module, index, state)
        self._kept = kept

    def __call__(self, x: torch.Tensor) -> Any:
        """x: the stream, [..., hidden]."""
        if self.state.active_sites & self.bit:
            self._kept.tensor = x
        return self.base(x)


class BlockExit(Hook):
    """The module whose output the layer adds to the stream."""

    __slots__ = ("_kept", "_site")

    def __init__(
        self, module: nn.Module, index: int, site: ResidualSite, kept: StreamIn, state: StepState
    ) -> None:
        super().__init__(module, index, state)
        self._site = site
        self._kept = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward; a tuple's first value is the output."""
        result = self.base(*args, **kwargs)
        if not self.state.active_sites & self.bit:
            return result
        stream, self._kept.tensor = self._kept.tensor, None
        if stream is None:
            raise RuntimeError(f"{self._site.spec.name}: the block was run without its norm")
        out = result[0] if isinstance(result, tuple) else result
        hidden = out.shape[-1]
        flat = out.reshape(-1, hidden)
        self._site.apply(stream.reshape(-1, hidden), flat, self.state)
        flat = flat.view(out.shape)
        return (flat, *result[1:]) if isinstance(result, tuple) else flat
