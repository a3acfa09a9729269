"""VeRA as PEFT 0.21.2 writes it (peft/tuners/vera; arXiv:2310.11454).

y = base(x) + b * ((d * (x A^T)) B^T): A: [r, in] and B: [out, r] are cut out of one pair that all
targets share, as large as the largest of them. The pair is in the file, or drawn anew from
``projection_prng_key`` as PEFT draws it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.convert import put_product
from manyhats.adapters.formats.fields import bad, boolean
from manyhats.adapters.formats.inner import inner_rank
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape
from manyhats.adapters.formats.tuner import Tuner, tuner_table
from manyhats.adapters.parts import SiteSpec

_SHARED: Final = ("base_model.vera_A", "base_model.vera_B")


def _plan(job: Job, targets: list[SiteSpec]) -> Section:
    r = inner_rank(job, "r", job.config.get("r", 256))
    boolean(job.config, "fan_in_fan_out")
    saved = boolean(job.config, "save_projection", default=True)
    seed = job.config.get("projection_prng_key", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise bad("projection_prng_key", seed, "an integer from 0 to 2**63 - 1")
    sizes = (
        (r, max(site.in_features for site in targets)),
        (max(site.out_features for site in targets), r),
    )
    shapes: dict[str, Shape] = dict(zip(_SHARED, sizes, strict=True)) if saved else {}
    for site in targets:
        d, b = _names(site)
        shapes |= {d: (r,), b: (site.out_features,)}
    return Section(shapes, partial(_build, job, targets, sizes, None if saved else seed))


def _build(
    job: Job,
    targets: list[SiteSpec],
    sizes: tuple[tuple[int, int], tuple[int, int]],
    seed: int | None,
    builder: Builder,
) -> None:
    if seed is None:
        shared_a, shared_b = (job.tensor(name) for name in _SHARED)
    else:
        generator = torch.Generator().manual_seed(seed)
        shared_a, shared_b = (_kaiming(size, generator) for size in sizes)
    for site in targets:
        name_d, name_b = _names(site)
        a = shared_a[:, : site.in_features]
        b = shared_b[: site.out_features].t() * job.tensor(name_d)[:, None] * job.tensor(name_b)
        put_product(job, builder, site, a, b, name_b)


def _kaiming(size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """PEFT's ``_kaiming_init``: uniform, the bound from the fan in."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(size[1]))
    return torch.empty(size).uniform_(-bound, bound, generator=generator)


def _names(site: SiteSpec) -> tuple[str, str]:
    return f"{PREFIX}{site.name}.vera_lambda_d", f"{PREFIX}{site.name}.vera_lambda_b"


VERA: Final = Tuner(
    name="VeRA",
    table=tuner_table(
        frozenset({"r", "fan_in_fan_out", "save_projection", "projection_prng_key", "bias"}),
        {
            "vera_dropout": "acts in training only",
            "d_initial": "how training began",
            "init_weights": "how training began",
        },
        without=frozenset({"exclude_modules"}),
    ),
    plan=_plan,
    transposed=True,
    own_bias="vera_only",
)
"""The family."""
