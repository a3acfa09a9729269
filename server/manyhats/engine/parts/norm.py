"""Norms: an adapter's own gain instead of the base's weight, and biases."""

from __future__ import annotations

import torch
from torch import nn

from manyhats.adapters.parts import SiteParts, SiteSpec
from manyhats.engine.hooks import Hook
from manyhats.engine.parts.site import PoolConfig, SlotVectors, fields_of, refuse_others
from manyhats.engine.step import StepState
from manyhats.errors import AdapterLoadError
from manyhats_kernels.stack_parts import NormParts

_SERVED = frozenset({"gain", "bias"})
AXIS_ATTRIBUTE = "manyhats_token_axis"
"""Attribute of a norm that sees heads: which axis of its four-dimensional input is the tokens'."""


class NormSite:
    """The gains, [slots, n], and biases of one norm."""

    __slots__ = ("_bias", "_config", "_gain", "_shift", "spec")

    def __init__(self, spec: SiteSpec, config: PoolConfig) -> None:
        self.spec = spec
        self._config = config
        self._gain = SlotVectors(config, spec.out_features, 1.0)
        self._bias = SlotVectors(config, spec.out_features, -0.0)
        self._shift = spec.bias.to(config.device, config.dtype) if spec.bias is not None else None

    @property
    def parts(self) -> NormParts:
        """The pools as kernels take them."""
        return NormParts(self._gain.rows, self._bias.rows)

    def worn(self, state: StepState) -> bool:
        """Whether an adapter of the running step does anything here."""
        return self._gain.worn(state) or self._bias.worn(state)

    def check(self, parts: SiteParts) -> None:
        """See ``Site.check``."""
        refuse_others(parts, self.spec, _SERVED)
        if parts.gain is not None and self.spec.norm is None:
            raise AdapterLoadError(
                f"{self.spec.name}: gain cannot be served, the base's norm is of an unknown kind"
            )

    def rows(self, parts: SiteParts) -> int:
        """See ``Site.rows``."""
        return 0

    def whole_bytes(self, parts: SiteParts) -> int:
        """See ``Site.whole_bytes``."""
        return 0

    def launches(self, parts: SiteParts) -> frozenset[str]:
        """See ``Site.launches``."""
        return frozenset(fields_of(parts))

    def write(self, slot: int, start: int, parts: SiteParts) -> None:
        """See ``Site.write``."""
        self._gain.write(slot, parts.gain)
        self._bias.write(slot, parts.bias)

    def clear(self, slot: int) -> None:
        """See ``Site.clear``."""
        self._gain.clear(slot)
        self._bias.clear(slot)

    def apply(
        self, x: torch.Tensor, y: torch.Tensor, token_axis: int, state: StepState
    ) -> torch.Tensor:
        """y, which the base's norm made of x, with what the worn adapters change. [..., n]."""
        n, norm, backend = self.spec.out_features, self.spec.norm, self._config.backend
        # A norm of queries or keys may leave its output strided as its input was.
        out = y.reshape(-1, n)
        batch = state.adapters if x.ndim < 4 else state.per_head(x.shape, token_axis)
        if norm is not None and self._gain.worn(state):
            backend.norm_rows(
                out,
                x.reshape(-1, n),
                self._gain.values,
                self._gain.has,
                self._shift,
                batch,
                eps=norm.eps,
                centered=norm.centered,
            )
        if self._bias.worn(state):
            backend.bias_add(out, self._bias.values, batch)
        return out.view(y.shape)


class AdaptedNorm(Hook):
    """A norm's forward with the adapters' gains and biases."""

    __slots__ = ("_site", "_token_axis")

    def __init__(self, module: nn.Module, index: int, site: NormSite, state: StepState) -> None:
        super().__init__(module, index, state)
        self._site = site
        self._token_axis: int = getattr(module, AXIS_ATTRIBUTE, 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., n] -> [..., n]."""
        y: torch.Tensor = self.base(x)
        if self.state.active_sites & self.bit:
            return self._site.apply(x, y, self._token_axis, self.state)
        return y
