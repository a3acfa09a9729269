"""LoHa and LoKr as PEFT 0.21.2 writes them (peft/tuners/loha, lokr; arXiv:2108.06098, 2309.14859).

LoHa's change is the elementwise product of two products of rank r: exactly a product of rank r^2,
whose rows are the products of each row of the one with each of the other. LoKr's is a Kronecker
product, whose singular triplets are the products of its factors' triplets.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.convert import Triplets, put_change, put_product, put_triplets
from manyhats.adapters.formats.fields import bad, boolean, number, table
from manyhats.adapters.formats.inner import inner_rank
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape
from manyhats.adapters.formats.targets import PatternTable
from manyhats.adapters.formats.tuner import Tuner, tuner_table
from manyhats.adapters.parts import SiteSpec

_HONOURED: Final = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})
_IRRELEVANT: Final = {
    "rank_dropout": "acts in training only",
    "module_dropout": "acts in training only",
    "init_weights": "how training began",
    "use_effective_conv2d": "concerns convolutions alone",
}
_Ranked = list[tuple[SiteSpec, int, float]]


def _ranked(job: Job, targets: list[SiteSpec]) -> _Ranked:
    """Each target with its rank and its scaling, alpha / r."""
    config = job.config
    r = inner_rank(job, "r", config.get("r", 8))
    alpha = number("alpha", config.get("alpha", 8))
    ranks = PatternTable(
        {k: inner_rank(job, "rank_pattern", v) for k, v in table(config, "rank_pattern")},
        "rank_pattern",
        job.matcher,
    )
    alphas = PatternTable(
        {k: number("alpha_pattern", v) for k, v in table(config, "alpha_pattern")},
        "alpha_pattern",
        job.matcher,
    )
    found = []
    for site in targets:
        rank = ranks.get(site.name, r)
        found.append((site, rank, alphas.get(site.name, alpha) / rank))
    return found


def _plan_loha(job: Job, targets: list[SiteSpec]) -> Section:
    ranked = _ranked(job, targets)
    shapes: dict[str, Shape] = {}
    for site, r, _ in ranked:
        for name in ("hada_w1", "hada_w2"):
            shapes[f"{PREFIX}{site.name}.{name}_a"] = (site.out_features, r)
            shapes[f"{PREFIX}{site.name}.{name}_b"] = (r, site.in_features)
    return Section(shapes, partial(_build_loha, job, ranked))


def _build_loha(job: Job, ranked: _Ranked, builder: Builder) -> None:
    for site, r, scaling in ranked:
        place = f"{PREFIX}{site.name}.hada_w"
        a1, b1, a2, b2 = (job.tensor(f"{place}{n}_{m}") for n in (1, 2) for m in "ab")
        source = f"{place}1_a"
        if r * r > min(site.in_features, site.out_features):
            change = partial(_hadamard, a1, b1, a2, b2, scaling)
            put_change(job, builder, site, change, source)
            continue
        a = (b1[:, None] * b2[None]).reshape(r * r, -1)
        b = (a1.t()[:, None] * a2.t()[None]).reshape(r * r, -1) * scaling
        put_product(job, builder, site, a, b, source)


def _hadamard(
    a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor, scaling: float
) -> torch.Tensor:
    return (a1 @ b1) * (a2 @ b2) * scaling


def _plan_lokr(job: Job, targets: list[SiteSpec]) -> Section:
    ranked = _ranked(job, targets)
    both = boolean(job.config, "decompose_both")
    boolean(job.config, "rank_dropout_scale")
    factor = job.config.get("decompose_factor", -1)
    if type(factor) is not int or not (factor == -1 or 1 <= factor < 2**31):
        raise bad("decompose_factor", factor, "-1 or a positive integer")
    shapes: dict[str, Shape] = {}
    for site, r, _ in ranked:
        place = f"{PREFIX}{site.name}.lokr_w"
        out_1, out_2 = _factorization(site.out_features, factor)
        in_1, in_2 = _factorization(site.in_features, factor)
        shapes |= _factor_shapes(f"{place}1", out_1, in_1, r, whole=not both)
        shapes |= _factor_shapes(f"{place}2", out_2, in_2, r, whole=False)
    return Section(shapes, partial(_build_lokr, job, ranked))


def _factor_shapes(name: str, out: int, width: int, r: int, *, whole: bool) -> dict[str, Shape]:
    """A factor of LoKr is kept as a product where the rank is low enough to save by it."""
    if whole or r >= max(out, width) / 2:
        return {name: (out, width)}
    return {f"{name}_a": (out, r), f"{name}_b": (r, width)}


def _build_lokr(job: Job, ranked: _Ranked, builder: Builder) -> None:
    for site, _, scaling in ranked:
        place = f"{PREFIX}{site.name}.lokr_w"
        w1, w2 = _factor(job, f"{place}1"), _factor(job, f"{place}2")
        triplets = partial(_kronecker, w1, w2, scaling, job.limits.max_rank)
        change = partial(_kron, w1, w2, scaling)
        put_triplets(job, builder, site, triplets, change, place)


def _factor(job: Job, name: str) -> torch.Tensor:
    if name in job.weights.tensors:
        return job.tensor(name)
    return job.tensor(f"{name}_a") @ job.tensor(f"{name}_b")


def _kron(w1: torch.Tensor, w2: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.kron(w1, w2) * scaling


def _kronecker(w1: torch.Tensor, w2: torch.Tensor, scaling: float, bound: int) -> Triplets:
    u1, s1, v1 = torch.linalg.svd(w1.double(), full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(w2.double(), full_matrices=False)
    values = torch.outer(s1, s2).flatten()
    ordered, order = torch.sort(values, descending=True)
    whole = torch.linalg.norm(ordered)
    significant = int((ordered > ordered[0] * 1e-7).sum())
    keep = min(bound, significant)
    first, second = order[:keep] // len(s2), order[:keep] % len(s2)
    a = (v1[first][:, :, None] * v2[second][:, None]).flatten(1)
    b = (u1.t()[first][:, :, None] * u2.t()[second][:, None]).flatten(1)
    error = float(torch.linalg.norm(ordered[keep:]) / whole) if float(whole) > 0 else 0.0
    return a.float(), (b * ordered[:keep, None] * scaling).float(), error


def _factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Two factors of ``dimension``, the smaller first; peft/tuners/lokr/layer.py, factorization."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    if factor == -1:
        factor = dimension
    m, n = 1, dimension
    length = m + n
    while m < n:
        new_m = m + 1
        while dimension % new_m != 0:
            new_m += 1
        new_n = dimension // new_m
        if new_m + new_n > length or new_m > factor:
            break
        m, n = new_m, new_n
    return (m, n) if m <= n else (n, m)


LOHA: Final = Tuner("LoHa", tuner_table(_HONOURED, _IRRELEVANT), _plan_loha, transposed=False)
"""The family."""

LOKR: Final = Tuner(
    "LoKr",
    tuner_table(
        _HONOURED | {"decompose_both", "decompose_factor", "rank_dropout_scale"}, _IRRELEVANT
    ),
    _plan_lokr,
    transposed=False,
)
"""The family."""
