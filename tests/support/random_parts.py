"""Adapters with random parts of every kind, made by hand: no family, no file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch

from manyhats.adapters.parts import (
    Activation,
    BaseSpec,
    Bottleneck,
    CompiledAdapter,
    Fusion,
    LowRank,
    Prefix,
    Rows,
    SiteKind,
    SiteParts,
    SiteSpec,
)
from manyhats.types import Digest


class Draw:
    """Signed random tensors of one seed, rounded to ``dtype`` and held in ``held``."""

    def __init__(
        self, seed: int, dtype: torch.dtype = torch.float32, held: torch.dtype = torch.float32
    ) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        self._held = held

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self._random) * scale + mean
        return values.to(self._dtype).to(self._held)

    def ids(self, count: int, of: int) -> torch.Tensor:
        return torch.randperm(of, generator=self._random)[:count].sort().values


def low_rank(site: SiteSpec, draw: Draw, rank: int = 5) -> LowRank:
    n = site.in_features
    scale = 0.5 if site.kind is SiteKind.EMBEDDING else n**-0.5
    return LowRank(draw(rank, n, scale=scale), draw(rank, site.out_features, scale=0.3))


def bottleneck(site: SiteSpec, draw: Draw, width: int = 6, **fields: object) -> Bottleneck:
    n = site.in_features
    return Bottleneck(
        **{
            "down": draw(width, n, scale=n**-0.5),
            "up": draw(width, n, scale=0.4),
            "activation": Activation.GELU,
            "down_bias": draw(width, scale=0.3),
            "up_bias": draw(n, scale=0.2),
            **fields,
        }
    )


def _linear(site: SiteSpec, draw: Draw, **kinds: bool) -> SiteParts:
    return SiteParts(
        low_rank=low_rank(site, draw) if kinds.get("low_rank") else None,
        bias=draw(site.out_features, scale=0.3) if kinds.get("bias") else None,
        input_scale=draw(site.in_features, scale=0.4, mean=1) if kinds.get("input_scale") else None,
        output_scale=draw(site.out_features, scale=0.4, mean=1)
        if kinds.get("output_scale")
        else None,
        dense=draw(site.out_features, site.in_features, scale=0.15) if kinds.get("dense") else None,
    )


def _bottlenecks(site: SiteSpec, draw: Draw, which: str) -> SiteParts:
    n = site.in_features
    if which == "parallel":
        return SiteParts(bottlenecks=(bottleneck(site, draw, parallel=True),))
    if which == "of_output":
        one = bottleneck(site, draw, of_output=True, activation=Activation.SILU)
        return SiteParts(bottlenecks=(one,))
    if which == "alone":
        one = bottleneck(site, draw, skip=False, width=40, up_bias=draw(n))
        return SiteParts(bottlenecks=(one,))
    if which == "gated":
        gate = draw(n, scale=n**-0.5)
        one = bottleneck(site, draw, gate=gate, gate_bias=0.3, activation=Activation.TANH)
        return SiteParts(bottlenecks=(one,))
    if which == "stack":
        stack = (
            bottleneck(site, draw, up_bias=None, activation=Activation.LEAKY_RELU),
            bottleneck(site, draw, width=3, of_output=True, activation=Activation.GELU_TANH),
            bottleneck(site, draw, width=1, down_bias=None, activation=Activation.IDENTITY),
        )
        return SiteParts(bottlenecks=stack)
    fusion = Fusion(
        query=draw(n, n, scale=n**-0.5),
        key=draw(n, n, scale=n**-0.5),
        value=draw(n, n, scale=n**-0.5) if which == "fusion" else None,
        query_bias=draw(n, scale=0.2),
        key_bias=draw(n, scale=0.2),
        temperature=1.5,
    )
    several = tuple(
        bottleneck(site, draw, width=w, activation=Activation.RELU)
        for w in ((4, 7, 2) if which == "fusion" else (3, 3))
    )
    return SiteParts(bottlenecks=several, fusion=fusion)


def _head(site: SiteSpec, draw: Draw, which: str) -> SiteParts:
    if which == "dense":
        return SiteParts(dense=draw(site.out_features, site.in_features, scale=0.15))
    if which == "rows":
        ids = draw.ids(40, site.out_features)
        return SiteParts(rows=Rows(ids, draw(40, site.in_features, scale=0.3)))
    return _linear(site, draw, low_rank=True, bias=True, output_scale=True, input_scale=True)


def _embedding(site: SiteSpec, draw: Draw, which: str) -> SiteParts:
    if which == "dense":
        return SiteParts(dense=draw(site.in_features, site.out_features, scale=0.15))
    if which == "rows":
        ids = draw.ids(120, site.in_features)
        return SiteParts(rows=Rows(ids, draw(120, site.out_features, scale=0.2)))
    return SiteParts(low_rank=low_rank(site, draw))


VIRTUAL = 5
"""Virtual tokens of the prefix and of the soft prompt."""

Make = Callable[[SiteSpec, Draw], SiteParts | None]


def _at(kind: SiteKind, make: Callable[[SiteSpec, Draw], SiteParts], every: int = 1) -> Make:
    """Parts at every ``every``-th site of the kind."""
    counter = iter(range(10_000))

    def at(site: SiteSpec, draw: Draw) -> SiteParts | None:
        return make(site, draw) if site.kind is kind and next(counter) % every == 0 else None

    return at


def _everything(site: SiteSpec, draw: Draw) -> SiteParts | None:
    if site.kind is SiteKind.LINEAR:
        return _linear(site, draw, low_rank=True, bias=True, input_scale=True, output_scale=True)
    if site.kind is SiteKind.RESIDUAL:
        return _bottlenecks(site, draw, "gated")
    if site.kind is SiteKind.HEAD:
        return _head(site, draw, "low_rank")
    if site.kind is SiteKind.NORM:
        return SiteParts(gain=draw(site.out_features, scale=0.2, mean=1))
    return None


def _kinds() -> Iterator[tuple[str, Make]]:
    for which in ("low_rank", "bias", "input_scale", "output_scale", "dense"):
        yield which, _at(SiteKind.LINEAR, lambda s, d, w=which: _linear(s, d, **{w: True}), 2)
    yield (
        "scales and more",
        _at(
            SiteKind.LINEAR,
            lambda s, d: _linear(
                s, d, low_rank=True, bias=True, input_scale=True, output_scale=True
            ),
        ),
    )
    yield "gain", _at(SiteKind.NORM, lambda s, d: SiteParts(gain=d(s.out_features, mean=1)))
    yield "norm bias", _at(SiteKind.NORM, lambda s, d: SiteParts(bias=d(s.out_features)))
    for which in ("low_rank", "rows", "dense"):
        yield f"head {which}", _at(SiteKind.HEAD, lambda s, d, w=which: _head(s, d, w))
        yield (
            f"embedding {which}",
            _at(SiteKind.EMBEDDING, lambda s, d, w=which: _embedding(s, d, w)),
        )
    yield (
        "soft prompt",
        lambda s, d: (
            SiteParts(soft_prompt=d(VIRTUAL, s.out_features, scale=0.5))
            if s.kind is SiteKind.EMBEDDING and not s.name.endswith("wpe")
            else None
        ),
    )
    yield (
        "prefix",
        _at(
            SiteKind.ATTENTION,
            lambda s, d: SiteParts(
                prefix=Prefix(*(d(VIRTUAL, s.in_features, s.out_features) for _ in "kv"))
            ),
        ),
    )
    for which in ("parallel", "of_output", "alone", "gated", "stack", "fusion", "two fused"):
        yield which, _at(SiteKind.RESIDUAL, lambda s, d, w=which: _bottlenecks(s, d, w))
    yield "everything", _everything


KINDS = tuple(name for name, _ in _kinds())


def random_adapter(
    kind: str,
    spec: BaseSpec,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    oracle: bool = False,
) -> CompiledAdapter:
    """An adapter of one of ``KINDS`` for the base; for the ``oracle`` the same values in fp32."""
    draw = Draw(seed * 1000 + KINDS.index(kind), dtype, torch.float32 if oracle else dtype)
    make = dict(_kinds())[kind]
    sites = {
        name: parts for name, site in spec.sites.items() if (parts := make(site, draw)) is not None
    }
    virtual = VIRTUAL if kind in ("soft prompt", "prefix") else 0
    digest = Digest(hashlib.sha256(f"{kind} {seed}".encode()).hexdigest())
    return CompiledAdapter(digest, kind, sites, virtual_tokens=virtual)
