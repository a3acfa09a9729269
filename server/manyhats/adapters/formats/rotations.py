"""OFT as PEFT 0.21.2 writes it (peft/tuners/oft/layer.py; arXiv:2306.07280).

A linear layer's input is rotated block by block before it: y = W (x R) + b, so that W' = W R^T. R
is made of the skew-symmetric Q whose upper triangle is in the file, by the Cayley transform or by
its Neumann series.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.convert import put_change
from manyhats.adapters.formats.fields import Refusal, bad, boolean, positive
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape
from manyhats.adapters.formats.tuner import Tuner, tuner_table
from manyhats.adapters.parts import SiteSpec

_MAX_TERMS: Final = 64


def _plan(job: Job, targets: list[SiteSpec]) -> Section:
    config = job.config
    boolean(config, "fan_in_fan_out")
    shared = boolean(config, "block_share")
    terms = 0
    if boolean(config, "use_cayley_neumann", default=True):
        terms = positive("num_cayley_neumann_terms", config.get("num_cayley_neumann_terms", 5))
        if terms > _MAX_TERMS:
            raise bad("num_cayley_neumann_terms", terms, f"at most {_MAX_TERMS}")
    blocks = {site.name: _block(job, site) for site in targets}
    shapes: dict[str, Shape] = {}
    for site in targets:
        size = blocks[site.name]
        count = 1 if shared else site.in_features // size
        shapes[_name(site)] = (count, size * (size - 1) // 2)
    return Section(shapes, partial(_build, job, targets, blocks, terms))


def _block(job: Job, site: SiteSpec) -> int:
    """The size of a block; PEFT moves what does not divide the inputs to the next that does."""
    r, size = job.config.get("r", 0), job.config.get("oft_block_size", 32)
    if type(r) is int and r == 0:
        return _fitting(site.in_features, positive("oft_block_size", size))
    if type(size) is int and size == 0:
        return site.in_features // _fitting(site.in_features, positive("r", r))
    raise bad("oft_block_size", size, "0 beside r, or r 0 beside it")


def _fitting(features: int, wanted: int) -> int:
    if wanted >= features:
        return features
    higher = lower = wanted
    while features % higher:
        higher += 1
    while features % lower:
        lower -= 1
    return lower if wanted - lower <= higher - wanted else higher


def _build(
    job: Job, targets: list[SiteSpec], blocks: dict[str, int], terms: int, builder: Builder
) -> None:
    for site in targets:
        name = _name(site)
        change = partial(_change, job, site, blocks[site.name], terms)
        put_change(job, builder, site, change, name)


def _change(job: Job, site: SiteSpec, size: int, terms: int) -> torch.Tensor:
    rotation = _rotation(job.tensor(_name(site)), size, terms)
    weight = job.base_weight(site)
    tiles = weight.reshape(site.out_features, site.in_features // size, size)
    rotation = rotation.expand(tiles.shape[1], size, size)
    return torch.einsum("obc,bkc->obk", tiles, rotation).reshape(weight.shape) - weight


def _rotation(upper: torch.Tensor, size: int, terms: int) -> torch.Tensor:
    """[blocks, size, size]; ``terms`` of the Neumann series, 0 for the transform itself."""
    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(upper.shape[0], size, size)
    q[:, rows, columns] = upper
    q = q - q.transpose(1, 2)
    eye = torch.eye(size).expand_as(q)
    if terms == 0:
        exact: torch.Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
        return exact
    if terms >= 3:
        terms = max(terms, 4)  # PEFT adds the last one at three terms as at four
    rotation, power = eye.clone(), eye
    for term in range(1, terms):
        power = power @ q
        rotation = rotation + (power if term == terms - 1 >= 3 else 2 * power)
    return rotation


def _name(site: SiteSpec) -> str:
    return f"{PREFIX}{site.name}.oft_R.weight"


OFT: Final = Tuner(
    "OFT",
    tuner_table(
        frozenset(
            {
                "r",
                "oft_block_size",
                "fan_in_fan_out",
                "bias",
                "block_share",
                "use_cayley_neumann",
                "num_cayley_neumann_terms",
            }
        ),
        {
            "module_dropout": "acts in training only",
            "init_weights": "how training began",
            "eps": "read with coft only, which is refused",
        },
        {"coft": Refusal("constrained OFT, which changes its weights as it computes", (False,))},
    ),
    _plan,
    transposed=False,
    own_bias="oft_only",
)
"""The family."""
