"""Collects an adapter's parts by site, in the parts' dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch

from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.parts import (
    BaseSpec,
    Bottleneck,
    Fusion,
    LowRank,
    Prefix,
    Rows,
    SiteParts,
    SiteSpec,
)
from manyhats.errors import AdapterRejectedError


class _Casting(Protocol):
    """What the builder needs of a ``Job``."""

    @property
    def base(self) -> BaseSpec: ...
    @property
    def limits(self) -> AdapterLimits: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def cast(self, tensor: torch.Tensor, source: str) -> torch.Tensor: ...


class Builder:
    """The parts so far. ``source`` names the tensor that a refusal is about."""

    def __init__(self, job: _Casting) -> None:
        self._job = job
        self._parts: dict[str, SiteParts] = {}
        self._biases: dict[str, tuple[torch.Tensor, str]] = {}
        self._dense_bytes = 0
        self._errors: list[float] = []

    def low_rank(
        self, site: SiteSpec, a: torch.Tensor, b: torch.Tensor, source_a: str, source_b: str
    ) -> None:
        """``a``: [rank, in]; ``b``: [rank, out], the scaling folded in. Rank 0 is no part."""
        if a.shape[0]:
            self.product(site, self._job.cast(a, source_a), self._job.cast(b, source_b))

    def product(self, site: SiteSpec, a: torch.Tensor, b: torch.Tensor) -> None:
        """The same of what is in the parts' dtype, contiguous and finite already."""
        self._put(site, low_rank=LowRank(a=a, b=b))

    def bias(self, site: SiteSpec, delta: torch.Tensor, source: str) -> None:
        """Add to what is added to the output, [out]; all zero is no part."""
        known, first = self._biases.get(site.name, (None, source))
        self._biases[site.name] = (delta if known is None else known + delta, first)

    def dense(self, site: SiteSpec, weight: torch.Tensor, source: str) -> None:
        """[out, in], or [ids, hidden], instead of the base's weight.

        Raises AdapterRejectedError ``too_large`` over the bound of all of them together.
        """
        self.check_dense(weight.numel(), source)
        self._dense_bytes += weight.numel() * self._job.dtype.itemsize
        self._put(site, dense=self._job.cast(weight, source))

    def check_dense(self, numel: int, source: str) -> None:
        """Refuse another replaced weight of ``numel`` values over the bound; see ``dense``."""
        bound = self._job.limits.max_dense_bytes
        if not self.can_hold(numel):
            raise AdapterRejectedError(
                "too_large",
                f"{source}: with it the replaced weights take "
                f"{self._dense_bytes + numel * self._job.dtype.itemsize} bytes, over the bound of "
                f"{bound} (max_dense_bytes)",
            )

    def can_hold(self, numel: int) -> bool:
        """Whether another replaced weight of ``numel`` values is within the bound."""
        more = numel * self._job.dtype.itemsize
        return self._dense_bytes + more <= self._job.limits.max_dense_bytes

    def scale_input(self, site: SiteSpec, scale: torch.Tensor, source: str) -> None:
        """[in]."""
        self._put(site, input_scale=self._job.cast(scale, source))

    def scale_output(self, site: SiteSpec, scale: torch.Tensor, source: str) -> None:
        """[out]."""
        self._put(site, output_scale=self._job.cast(scale, source))

    def gain(self, site: SiteSpec, gain: torch.Tensor, source: str) -> None:
        """[size], the base's offset added."""
        self._put(site, gain=self._job.cast(gain, source))

    def rows(
        self, site: SiteSpec, token_ids: torch.Tensor, vectors: torch.Tensor, source: str
    ) -> None:
        """Ascending int64 [n]; [n, features]."""
        part = Rows(token_ids=token_ids.clone(), vectors=self._job.cast(vectors, source))
        self._put(site, rows=part)

    def soft_prompt(self, site: SiteSpec, vectors: torch.Tensor, source: str) -> None:
        """[tokens, hidden]."""
        self._put(site, soft_prompt=self._job.cast(vectors, source))

    def prefix(self, site: SiteSpec, k: torch.Tensor, v: torch.Tensor, source: str) -> None:
        """[tokens, kv heads, head dim] each."""
        self._put(site, prefix=Prefix(k=self._job.cast(k, source), v=self._job.cast(v, source)))

    def residual(
        self, site: SiteSpec, bottlenecks: tuple[Bottleneck, ...], fusion: Fusion | None = None
    ) -> None:
        """Everything at a residual site, cast already."""
        self._parts[site.name] = SiteParts(bottlenecks=bottlenecks, fusion=fusion)

    def converted(self, error: float) -> None:
        """A site whose weight change was approximated; the Frobenius norm left out over all."""
        self._errors.append(error)

    def sites(self) -> Mapping[str, SiteParts]:
        """Every site with parts, in the base's order."""
        for name, (delta, source) in self._biases.items():
            if bool(delta.any()):
                site = self._job.base.sites[name]
                self._put(site, bias=self._job.cast(delta, source))
        return {name: self._parts[name] for name in self._job.base.sites if name in self._parts}

    def metadata(self) -> dict[str, str]:
        """Ranks, the largest error of a conversion, how many weights are replaced."""
        ranks = sorted({p.low_rank.rank for p in self._parts.values() if p.low_rank is not None})
        found = {}
        if ranks:
            found["rank"] = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        replaced = sum(parts.dense is not None for parts in self._parts.values())
        if replaced:
            found["replaced_sites"] = str(replaced)
        if self._errors:
            found["conversion_error"] = f"{max(self._errors):.2e}"
            found["converted_sites"] = str(len(self._errors))
        return found

    def _put(self, site: SiteSpec, **parts: object) -> None:
        known = self._parts.get(site.name)
        if known is None:  # as nearly always, hundreds of times
            self._parts[site.name] = SiteParts(**parts)  # type: ignore[arg-type]
            return
        for name in parts:
            if getattr(known, name) is not None:
                raise AdapterRejectedError(
                    "bad_config", f"{site.name}: the configuration asks for {name} of it twice"
                )
        self._parts[site.name] = replace(known, **parts)  # type: ignore[arg-type]
