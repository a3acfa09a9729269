"""DeLoRA, MiSS and HRA as PEFT 0.21.2 writes them: exactly low-rank products, once rewritten."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.convert import put_change, put_product
from manyhats.adapters.formats.fields import bad, boolean, positive, table
from manyhats.adapters.formats.inner import inner_rank
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape
from manyhats.adapters.formats.targets import PatternTable
from manyhats.adapters.formats.tuner import Tuner, tuner_table
from manyhats.adapters.parts import SiteSpec

_TRAINING: Final = "acts in training only"
_START: Final = "how training began"
_MIN_NORM: Final = 1e-4


def _plan_delora(job: Job, targets: list[SiteSpec]) -> Section:
    r = inner_rank(job, "r", job.config.get("r", 8))
    ranks = PatternTable(
        {k: inner_rank(job, "rank_pattern", v) for k, v in table(job.config, "rank_pattern")},
        "rank_pattern",
        job.matcher,
    )
    ranked = [(site, ranks.get(site.name, r)) for site in targets]
    shapes: dict[str, Shape] = {}
    for site, rank in ranked:
        place = f"{PREFIX}{site.name}.delora_"
        shapes |= {
            f"{place}A": (rank, site.in_features),
            f"{place}B": (site.out_features, rank),
            f"{place}lambda": (1,),
            f"{place}w_norm": (site.in_features,),
        }
    return Section(shapes, partial(_build_delora, job, ranked))


def _build_delora(job: Job, ranked: list[tuple[SiteSpec, int]], builder: Builder) -> None:
    """delta = B diag(lambda / (r |A_i| |B_i|)) A * w_norm (peft/tuners/delora/layer.py)."""
    for site, rank in ranked:
        place = f"{PREFIX}{site.name}.delora_"
        a, b = job.tensor(f"{place}A"), job.tensor(f"{place}B").t()
        norms = a.norm(dim=1).clamp(min=_MIN_NORM) * b.norm(dim=1).clamp(min=_MIN_NORM)
        factors = job.tensor(f"{place}lambda") / rank / norms
        a = a * job.tensor(f"{place}w_norm")
        put_product(job, builder, site, a, b * factors[:, None], f"{place}B")


def _plan_miss(job: Job, targets: list[SiteSpec]) -> Section:
    r = inner_rank(job, "r", job.config.get("r", 64))
    mode = job.config.get("init_weights", True)
    if not (mode is None or isinstance(mode, bool) or mode in ("bat", "mini")):
        raise bad("init_weights", mode, "true, false, 'bat' or 'mini'")
    mini = positive("mini_r", job.config.get("mini_r", 1)) if mode == "mini" else 0
    shapes: dict[str, Shape] = {}
    for site in targets:
        fits = r <= site.in_features
        if mode == "bat":
            fits = site.in_features % r == 0 and site.out_features % r == 0
        elif mode == "mini":
            fits = fits and site.out_features % mini == 0
        if not fits:
            raise bad("r" if mode != "mini" else "mini_r", mini or r, f"fit for {site.name}")
        shapes[_miss_name(site)] = (
            (site.out_features // r, r, r) if mode == "bat" else (r, mini or site.out_features)
        )
    return Section(shapes, partial(_build_miss, job, targets, mode == "bat"))


def _build_miss(job: Job, targets: list[SiteSpec], bat: bool, builder: Builder) -> None:
    """The input's blocks of r features are summed, and the sum multiplied by the trained block
    (peft/tuners/miss/layer.py; arXiv:2409.15371); ``bat`` multiplies the base's weight by blocks.
    """
    for site in targets:
        name = _miss_name(site)
        block = job.tensor(name)
        if bat:
            change = partial(_bat, job, site, block)
            put_change(job, builder, site, change, name)
            continue
        r = block.shape[0]
        a = torch.zeros(r, site.in_features)
        columns = torch.arange(site.in_features)
        a[columns % r, columns] = 1.0
        b = block.repeat(1, site.out_features // block.shape[1])
        put_product(job, builder, site, a, b, name)


def _bat(job: Job, site: SiteSpec, block: torch.Tensor) -> torch.Tensor:
    r = block.shape[-1]
    weight = job.base_weight(site)
    tiles = weight.reshape(site.out_features // r, r, site.in_features // r, r).permute(2, 0, 1, 3)
    return (tiles @ block + block).permute(1, 2, 0, 3).reshape(weight.shape)


def _miss_name(site: SiteSpec) -> str:
    return f"{PREFIX}{site.name}.miss_block"


def _plan_hra(job: Job, targets: list[SiteSpec]) -> Section:
    r = inner_rank(job, "r", job.config.get("r", 8))
    orthogonal = boolean(job.config, "apply_GS")
    shapes: dict[str, Shape] = {_hra_name(site): (site.in_features, r) for site in targets}
    return Section(shapes, partial(_build_hra, job, targets, orthogonal))


def _build_hra(job: Job, targets: list[SiteSpec], orthogonal: bool, builder: Builder) -> None:
    """W' = W Q, Q the product of the reflections I - 2 u u^T (peft/tuners/hra/layer.py;
    arXiv:2405.17484): Q - I = M U^T has rank r, so the change is (W M) U^T, exactly.
    """
    for site in targets:
        name = _hra_name(site)
        u = job.tensor(name)
        if orthogonal:
            u, m = _orthonormal(u)
        else:
            u = u / u.norm(dim=0)
            m = torch.zeros_like(u)
            for i in range(u.shape[1]):  # Q_i u = u + sum of what was added before
                column = u[:, i]
                m[:, i] = -2 * (column + m[:, :i] @ (u[:, :i].t() @ column))
        put_product(job, builder, site, u.t(), (job.base_weight(site) @ m).t(), name)


def _orthonormal(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram-Schmidt in PEFT's order; Q = I - 2 V V^T."""
    columns: list[torch.Tensor] = []
    for i in range(u.shape[1]):
        column = u[:, i]
        for known in columns:
            column = column - (known @ column) * known
        columns.append(column / column.norm())
    v = torch.stack(columns, dim=1)
    return v, -2 * v


def _hra_name(site: SiteSpec) -> str:
    return f"{PREFIX}{site.name}.hra_u"


DELORA: Final = Tuner(
    "DeLoRA",
    tuner_table(
        frozenset({"r", "rank_pattern", "bias"}),
        {
            "delora_lambda": "the trained value is in the file",
            "lambda_pattern": "the trained value is in the file",
            "module_dropout": _TRAINING,
            "init_weights": _START,
        },
    ),
    _plan_delora,
    transposed=False,
    own_bias="delora_only",
)
"""The family."""

MISS: Final = Tuner(
    "MiSS",
    tuner_table(frozenset({"r", "mini_r", "init_weights", "bias"}), {"miss_dropout": _TRAINING}),
    _plan_miss,
    transposed=False,
    own_bias="MiSS_only",
)
"""The family."""

HRA: Final = Tuner(
    "HRA",
    tuner_table(frozenset({"r", "apply_GS", "bias"}), {"init_weights": _START}),
    _plan_hra,
    transposed=False,
    own_bias="hra_only",
)
"""The family."""
