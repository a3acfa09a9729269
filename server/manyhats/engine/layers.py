"""Makes the base's layers adapter-aware, in place and without copying a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from manyhats.engine.pool import AdapterPool, SitePool
from manyhats.engine.step import StepState


class AdaptedLayer:
    """A base layer's forward with the adapters' parts added to its output.

    A step of base tokens alone (or of adapters with nothing here) pays for one shift and test.
    """

    __slots__ = ("_base", "_bit", "_in", "_out", "_pool", "_state")

    def __init__(self, module: nn.Module, index: int, pool: SitePool, state: StepState) -> None:
        before = module.forward
        # An engine built anew over the same model takes the place of the one before.
        self._base: Callable[[torch.Tensor], torch.Tensor] = (
            before._base if isinstance(before, AdaptedLayer) else before
        )
        self._bit = 1 << index
        self._pool = pool
        self._state = state
        self._in = pool.spec.in_features
        self._out = pool.spec.out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        y: torch.Tensor = self._base(x)
        state = self._state
        if state.active_sites & self._bit:
            self._pool.apply(x.reshape(-1, self._in), y.view(-1, self._out), state)
        return y


def install(modules: Mapping[str, nn.Module], pool: AdapterPool, state: StepState) -> None:
    """Replaces the forward of every site's module. ``modules``: by site name, at least the pool's
    sites.
    """
    for index, site in enumerate(pool.sites):
        module = modules[site.spec.name]
        # The instance's own forward is what nn.Module calls; parameters and names stay where they
        # are.
        module.forward = AdaptedLayer(module, index, site, state)
