"""Embeddings that PEFT saves whole beside a tuner (``save_embedding_layers``).

``save_pretrained`` writes the base's embedding and head as they were during training where a tuner
targets them (peft/utils/save_and_load.py, get_peft_model_state_dict); loading puts them back.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.job import PREFIX, Job, Section
from manyhats.adapters.parts import SiteKind, SiteSpec


def resized_section(job: Job, targets: Iterable[SiteSpec]) -> Section:
    """The weights under targeted embeddings and heads, where the file has them.

    One that is the base's own is no part; another one replaces it.
    """
    found = {}
    for site in targets:
        name = f"{PREFIX}{site.name}.base_layer.weight"
        if site.kind in (SiteKind.EMBEDDING, SiteKind.HEAD) and name in job.weights.tensors:
            found[name] = site
    shapes = {
        name: (site.in_features, site.out_features)
        if site.kind is SiteKind.EMBEDDING
        else (site.out_features, site.in_features)
        for name, site in found.items()
    }
    return Section(shapes, partial(_build, job, found))


def _build(job: Job, found: dict[str, SiteSpec], builder: Builder) -> None:
    for name, site in found.items():
        weight = job.tensor(name)
        own = job.base_weight(site)
        if torch.equal(weight.to(job.dtype), own.to(job.dtype)):
            continue
        builder.dense(site, weight * site.scale, name)
        for head in job.base.sites.values():
            if head.tied_to == site.name:
                builder.dense(head, weight, name)
