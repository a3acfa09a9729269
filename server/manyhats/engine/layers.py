"""Makes the base's layers adapter-aware, in place and without copying a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from manyhats.adapters.parts import SiteKind
from manyhats.engine.attention import PagedAttention
from manyhats.engine.hooks import Hook, unhook
from manyhats.engine.parts.embedding import AdaptedEmbedding, EmbeddingSite
from manyhats.engine.parts.norm import AdaptedNorm, NormSite
from manyhats.engine.parts.prefix import PrefixSite
from manyhats.engine.parts.residual import BlockEntry, BlockExit, ResidualSite, StreamIn
from manyhats.engine.pool import AdapterPool
from manyhats.engine.site_pool import SitePool
from manyhats.engine.step import StepState


class AdaptedLayer(Hook):
    """A base layer's forward with the adapters' parts added to its output.

    A step of base tokens alone (or of adapters with nothing here) pays for one shift and test.
    """

    __slots__ = ("_head", "_in", "_out", "pool")

    def __init__(self, module: nn.Module, index: int, pool: SitePool, state: StepState) -> None:
        super().__init__(module, index, state)
        self.pool = pool
        self._head = pool.spec.kind is SiteKind.HEAD
        self._in = pool.spec.in_features
        self._out = pool.spec.out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        state = self.state
        if not state.active_sites & self.bit:
            plain: torch.Tensor = self.base(x)
            return plain
        pool = self.pool
        batch = state.head if self._head else state.adapters
        if pool.extras.slots & state.worn_slots:
            return pool.extras.run(self.base, pool.apply, x, batch, state)
        y: torch.Tensor = self.base(x)
        pool.apply(x.reshape(-1, self._in), y.view(-1, self._out), batch, state)
        return y


def install(
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, tuple[nn.Module, nn.Module]],
    pool: AdapterPool,
    state: StepState,
) -> None:
    """Replaces the forward of every site's module.

    ``modules``: by site name, at least the pool's sites that are modules; ``blocks``: by residual
    site, the norm at the block's entry and the module whose output is added to the stream. An
    engine built anew over the same model takes the place of the one before. The instance's own
    forward is what nn.Module calls; parameters and names stay where they are.
    """
    for module in (*modules.values(), *(m for pair in blocks.values() for m in pair)):
        unhook(module)
    # Residual sites last: outside of a norm's own gain.
    order = sorted(range(len(pool.sites)), key=lambda i: isinstance(pool.sites[i], ResidualSite))
    for index in order:
        site = pool.sites[index]
        name = site.spec.name
        if isinstance(site, ResidualSite):
            entry, block = blocks[name]
            kept = StreamIn()
            entry.forward = BlockEntry(entry, index, kept, state)
            block.forward = BlockExit(block, index, site, kept, state)
            continue
        module = modules[name]
        if isinstance(site, SitePool):
            module.forward = AdaptedLayer(module, index, site, state)
        elif isinstance(site, NormSite):
            module.forward = AdaptedNorm(module, index, site, state)
        elif isinstance(site, EmbeddingSite):
            module.forward = AdaptedEmbedding(module, index, site, state)
        elif isinstance(site, PrefixSite):
            attention: PagedAttention = module.manyhats_attention  # type: ignore[assignment]
            attention.prefixes = site
