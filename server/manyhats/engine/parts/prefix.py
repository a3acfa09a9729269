"""Attention: keys and values of an adapter's virtual tokens, put in before they are cached."""

from __future__ import annotations

import torch

from manyhats.adapters.parts import SiteParts, SiteSpec
from manyhats.engine.parts.site import PoolConfig, nbytes, refuse_others
from manyhats.engine.step import StepState

_SERVED = frozenset({"prefix"})


class PrefixSite:
    """The prefixes of one attention module by slot, [tokens, kv heads, head dim] each."""

    __slots__ = ("_config", "_own", "spec")

    def __init__(self, spec: SiteSpec, config: PoolConfig) -> None:
        self.spec = spec
        self._config = config
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def check(self, parts: SiteParts) -> None:
        """See ``Site.check``."""
        refuse_others(parts, self.spec, _SERVED)

    def rows(self, parts: SiteParts) -> int:
        """See ``Site.rows``."""
        return 0

    def whole_bytes(self, parts: SiteParts) -> int:
        """See ``Site.whole_bytes``."""
        return nbytes(parts.prefix.k, parts.prefix.v) if parts.prefix is not None else 0

    def launches(self, parts: SiteParts) -> frozenset[str]:
        """See ``Site.launches``: a decode step has no virtual tokens."""
        return frozenset()

    def write(self, slot: int, start: int, parts: SiteParts) -> None:
        """See ``Site.write``."""
        prefix = parts.prefix
        if prefix is not None:
            shape = (len(prefix.k), self.spec.in_features, self.spec.out_features)
            what = f"prefix of {self.spec.name}"
            place = self._config.place
            self._own[slot] = place(prefix.k, shape, what), place(prefix.v, shape, what)

    def clear(self, slot: int) -> None:
        """See ``Site.clear``."""
        self._own.pop(slot, None)

    def apply(self, k: torch.Tensor, v: torch.Tensor, state: StepState) -> None:
        """Puts the step's virtual tokens' rows into k and v, [T, kv heads, head dim], in place."""
        for slot, begin, end, position in state.virtual:
            own = self._own.get(slot)
            if own is not None:
                k[begin:end] = own[0][position : position + end - begin]
                v[begin:end] = own[1][position : position + end - begin]
