"""What worn adapters do in a native stack's layers beside low-rank products.

Scales, biases, gains and bottlenecks lie in the sites' pools; the stack is told where, once after
every change of the pool. Whole weights, fusions, gains of heads and scales of an input that several
layers share are not in it: steps where such are worn go through the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manyhats.engine.model.load import BaseModel
from manyhats.engine.model.spec import site_modules
from manyhats.engine.parts.norm import NormSite
from manyhats.engine.parts.residual import ResidualSite
from manyhats.engine.pool import AdapterPool
from manyhats.engine.site_pool import SitePool
from manyhats.engine.step import StepState
from manyhats_kernels.stack import LayerStack
from manyhats_kernels.stack_parts import LayerParts, LinearParts, NormParts, StackParts

LINEAR = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_OWN_INPUT = frozenset({"self_attn.o_proj", "mlp.down_proj"})
_NO_LINEAR = LinearParts(None, None, None)
_NO_NORM = NormParts(None, None)


@dataclass(frozen=True, slots=True)
class LayerSites:
    """One layer's sites, as far as the pool has them. ``heads``: the norms of q's and k's heads."""

    linear: Mapping[str, SitePool]
    norms: tuple[NormSite | None, NormSite | None]
    heads: Sequence[NormSite]
    attention: ResidualSite | None
    mlp: ResidualSite | None

    def takes(self, state: StepState) -> bool:
        """Whether all that the worn adapters do here is in a stack."""
        worn = state.worn_slots
        for name, site in self.linear.items():
            extras = site.extras
            if extras.slots & worn and (
                extras.replaces(state) or (name not in _OWN_INPUT and extras.scales_input(state))
            ):
                return False
        if any(site.worn(state) for site in self.heads):
            return False
        return not any(site and site.fuses(state) for site in (self.attention, self.mlp))

    @property
    def parts(self) -> LayerParts:
        """The pools as they now lie."""
        first, second = (_NO_NORM if site is None else site.parts for site in self.norms)
        return LayerParts(
            linear=tuple(self._linear(name) for name in LINEAR),
            norms=(first, second),
            attention=self.attention.rounds if self.attention else (),
            mlp=self.mlp.rounds if self.mlp else (),
        )

    def _linear(self, name: str) -> LinearParts:
        site = self.linear.get(name)
        if site is None:
            return _NO_LINEAR
        own = site.extras.parts
        return own if name in _OWN_INPUT else replace(own, input=None)


class PartsOfStack:
    """The tables of one stack. Used by the step thread alone."""

    def __init__(self, layers: Sequence[LayerSites], pool: AdapterPool, stack: LayerStack) -> None:
        self._layers = layers
        self._pool = pool
        self._stack = stack
        self._version: int | None = None
        self._parts: StackParts | None = None
        self._judged: tuple[int, int] | None = None
        self._taken = False

    def takes(self, state: StepState) -> bool:
        """Whether all that the running step's adapters do in the layers is in the stack."""
        if self._pool.rows_alone(state):
            return True
        if state.virtual:
            return False
        step = (self._pool.version, state.worn_slots)
        if self._judged != step:
            self._taken = all(layer.takes(state) for layer in self._layers)
            self._judged = step
        return self._taken

    def now(self, state: StepState) -> StackParts | None:
        """Where the pools' vectors and bottlenecks lie; None where the step needs none of them."""
        if self._pool.rows_alone(state):
            return None
        version = self._pool.version
        if self._parts is None or self._version != version:
            self._parts = self._stack.parts([layer.parts for layer in self._layers])
            self._version = version
        return self._parts


def layer_sites(decoder: Any, base: BaseModel, pool: AdapterPool | None) -> list[LayerSites]:
    """The sites of the pool that lie in each of the decoder's layers."""
    modules = site_modules(base.module, base.spec)
    linear: dict[int, SitePool] = {}
    norms: dict[int, NormSite] = {}
    blocks: dict[int, ResidualSite] = {}
    for site in pool.sites if pool is not None else ():
        name = site.spec.name
        if isinstance(site, SitePool):
            linear[id(modules[name])] = site
        elif isinstance(site, NormSite):
            norms[id(modules[name])] = site
        elif isinstance(site, ResidualSite):
            blocks[id(base.blocks[name][1])] = site

    def of_layer(layer: Any) -> LayerSites:
        found = {name: linear.get(id(layer.get_submodule(name))) for name in LINEAR}
        heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        return LayerSites(
            linear={name: site for name, site in found.items() if site is not None},
            norms=(
                norms.get(id(layer.input_layernorm)),
                norms.get(id(layer.post_attention_layernorm)),
            ),
            heads=[norms[id(norm)] for norm in heads if id(norm) in norms],
            attention=blocks.get(id(layer.self_attn)),
            mlp=blocks.get(id(layer.mlp)),
        )

    return [of_layer(layer) for layer in decoder.layers]
