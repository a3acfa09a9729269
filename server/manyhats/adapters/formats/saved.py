"""Modules trained as a whole: ``modules_to_save``, and LN-tuning's copies.

PEFT replaces the module by the trained copy (peft/utils/other.py, ModulesToSaveWrapper), whose
tensors are in the file under the module's own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape
from manyhats.adapters.parts import SiteKind, SiteSpec
from manyhats.adapters.strict_json import listed
from manyhats.errors import AdapterRejectedError

_SERVED = frozenset({SiteKind.LINEAR, SiteKind.HEAD, SiteKind.EMBEDDING, SiteKind.NORM})


def saved_section(
    job: Job, names: Iterable[str], targets: Iterable[SiteSpec] = (), *, tie: bool = False
) -> Section:
    """What ``modules_to_save`` calls for; a name means every module whose own name ends with it.

    Args:
        job: The compilation.
        names: The field's value.
        targets: Sites that the tuner itself targets; one of them cannot be replaced as well.
        tie: ``ensure_weight_tying``.

    Raises:
        AdapterRejectedError: ``no_module_matched``, ``bad_config``, ``unsupported_feature``.
    """
    endings = tuple(names)
    if not endings:
        return Section({}, lambda builder: None)
    sites = [site for site in job.base.sites.values() if site.name.endswith(endings)]
    for ending in endings:
        if not any(site.name.endswith(ending) for site in sites):
            leaves = dict.fromkeys(name.rpartition(".")[2] for name in job.base.sites)
            raise AdapterRejectedError(
                "no_module_matched",
                f"modules_to_save names {ending[:120]!r}, which is no module that can be replaced; "
                f"the base has {listed(leaves)}",
                param="modules_to_save",
            )
    both = {site.name for site in sites} & {site.name for site in targets}
    if both:
        raise AdapterRejectedError(
            "bad_config",
            f"modules_to_save and target_modules both name {listed(sorted(both))}",
            param="modules_to_save",
        )
    if tie and any(_is_tied(job, site) for site in sites):
        raise AdapterRejectedError(
            "unsupported_feature",
            "ensure_weight_tying of a tied embedding is not served by this version",
            param="ensure_weight_tying",
        )
    return replaced_section(job, {site.name: (site, f"{PREFIX}{site.name}") for site in sites})


def replaced_section(job: Job, modules: Mapping[str, tuple[SiteSpec, str]]) -> Section:
    """Trained copies of modules; each value is a site and where its tensors lie in the file."""
    shapes: dict[str, Shape] = {}
    for site, place in modules.values():
        if site.kind not in _SERVED:
            raise AdapterRejectedError(
                "unsupported_site", f"{site.name} cannot be replaced: it is no single weight"
            )
        shapes[f"{place}.weight"] = _shape(site)
        if site.bias is not None:
            shapes[f"{place}.bias"] = (site.out_features,)
    return Section(shapes, partial(_build, job, list(modules.values())))


def _shape(site: SiteSpec) -> Shape:
    if site.kind is SiteKind.NORM:
        return (site.out_features,)
    if site.kind is SiteKind.EMBEDDING or site.transposed:
        return (site.in_features, site.out_features)
    return (site.out_features, site.in_features)


def _is_tied(job: Job, site: SiteSpec) -> bool:
    heads = [s for s in job.base.sites.values() if s.tied_to is not None]
    return any(site.name in (head.name, head.tied_to) for head in heads)


def _build(job: Job, modules: list[tuple[SiteSpec, str]], builder: Builder) -> None:
    for site, place in modules:
        name = f"{place}.weight"
        if site.kind is not SiteKind.NORM:
            # counted before it is read: an embedding may be large
            builder.check_dense(site.in_features * site.out_features, name)
        weight = job.tensor(name)
        if site.kind is SiteKind.NORM:
            builder.gain(site, weight + _offset(site), name)
        else:
            builder.dense(site, _logical(site, weight), name)
        if site.bias is not None:
            builder.bias(site, job.tensor(f"{place}.bias") - site.bias, f"{place}.bias")


def _offset(site: SiteSpec) -> float:
    if site.norm is None:
        raise AdapterRejectedError(
            "unsupported_site", f"{site.name} is a normalization of a kind that is not known here"
        )
    return site.offset


def _logical(site: SiteSpec, weight: torch.Tensor) -> torch.Tensor:
    if site.kind is SiteKind.EMBEDDING:
        return weight * site.scale
    return weight.t() if site.transposed else weight
