"""Trainable tokens: replaced rows of embeddings, alone or beside LoRA.

PEFT puts the trained vectors in the place of the embedding's rows, and of the head's where the two
share a weight (peft/tuners/trainable_tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import bad, check_fields, field_table
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape, assemble
from manyhats.adapters.formats.targets import matched_sites, selection
from manyhats.adapters.parts import BaseSpec, CompiledAdapter, SiteKind, SiteSpec
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

TABLE: Final = field_table(
    {"token_indices", "target_modules"},
    {"init_weights": "how training began"},
)
_KINDS: Final = frozenset({SiteKind.EMBEDDING, SiteKind.HEAD})


def compile_trainable_tokens(job: Job) -> CompiledAdapter:
    """Compile PEFT's TRAINABLE_TOKENS; see ``compile_adapter``."""
    check_fields(job.config, TABLE)
    ids = job.config.get("token_indices")
    if job.config.get("target_modules") is None:
        sites = [input_embedding(job.base)]
    else:
        sites = matched_sites(
            selection(job.config), job.base, job.matcher, kinds=_KINDS, family="TRAINABLE_TOKENS"
        )
    if any(site.tied_to in {s.name for s in sites} for site in sites):
        sites = [site for site in sites if site.tied_to is None]  # PEFT ties the two again
    named = {site.name: (site, ids) for site in sites}
    section = _section(job, named, "token_indices", "trainable_tokens_delta")
    return assemble(job, "trainable_tokens", [section])


def trained_tokens_section(job: Job, targets: list[SiteSpec]) -> Section:
    """What ``trainable_token_indices`` of a LoRA configuration calls for."""
    field = "trainable_token_indices"
    value = job.config.get(field)
    if value is None:
        return Section({}, lambda builder: None)
    if isinstance(value, list):
        embedding = input_embedding(job.base)
        named: dict[str, tuple[SiteSpec, object]] = {embedding.name: (embedding, value)}
    elif isinstance(value, dict):
        named = _by_module(job.base, value, field)
    else:
        raise bad(field, value, "a list of token ids, or an object from module names to lists")
    for site in targets:
        if site.name in named or site.tied_to in named:
            raise bad(field, value, "of modules that target_modules does not name")
    return _section(job, named, field, "token_adapter.trainable_tokens_delta")


def input_embedding(base: BaseSpec) -> SiteSpec:
    """The embedding of token ids: what a tied head shares, else the first one."""
    found = [site for site in base.sites.values() if site.kind is SiteKind.EMBEDDING]
    if not found:
        raise AdapterRejectedError("no_module_matched", "the base has no embedding of token ids")
    return found[0]


def _by_module(
    base: BaseSpec, value: Mapping[str, object], field: str
) -> dict[str, tuple[SiteSpec, object]]:
    named: dict[str, tuple[SiteSpec, object]] = {}
    for ending, ids in value.items():
        sites = [s for s in base.sites.values() if s.kind in _KINDS and s.name.endswith(ending)]
        if not sites or not ending:
            raise AdapterRejectedError(
                "no_module_matched",
                f"{field} names {shown(ending)}, which is neither an embedding nor the head",
                param=field,
            )
        for site in sites:
            if site.name in named:
                raise bad(field, ending, "the only name of its module")
            named[site.name] = (site, ids)
    for name, (site, ids) in list(named.items()):
        if site.tied_to in named:
            if named[site.tied_to][1] != ids:
                raise bad(field, ids, "the same for the head as for the embedding it is tied to")
            del named[name]
    return named


def _section(
    job: Job, named: Mapping[str, tuple[SiteSpec, object]], field: str, leaf: str
) -> Section:
    wanted: dict[str, tuple[SiteSpec, torch.Tensor]] = {}
    for site, ids in named.values():
        if site.kind is SiteKind.HEAD and (site.bias is not None or site.tied_to is not None):
            why = "has a bias, which PEFT drops" if site.bias is not None else "is tied"
            raise AdapterRejectedError(
                "unsupported_site", f"{site.name} {why}; trained tokens of it are not served"
            )
        wanted[f"{PREFIX}{site.name}.{leaf}"] = (site, _token_ids(site, ids, field))
    shapes: dict[str, Shape] = {
        name: (
            len(ids),
            site.in_features if site.kind is SiteKind.HEAD else site.out_features,
        )
        for name, (site, ids) in wanted.items()
    }
    # PEFT saves the vectors a second time under a head that shares the embedding's weight
    again = {}
    for name, (site, _) in wanted.items():
        for head in job.base.sites.values():
            second = f"{PREFIX}{head.name}.{leaf}"
            if head.tied_to == site.name and second in job.weights.tensors:
                again[second] = name
                shapes[second] = shapes[name]
    return Section(shapes, partial(_build, job, wanted, again))


def _token_ids(site: SiteSpec, value: object, field: str) -> torch.Tensor:
    vocabulary = site.in_features if site.kind is SiteKind.EMBEDDING else site.out_features
    if (
        not isinstance(value, list)
        or not value
        or not all(type(item) is int and 0 <= item < vocabulary for item in value)
        or len(set(value)) != len(value)
    ):
        raise bad(field, value, f"a list of different token ids from 0 to {vocabulary - 1}")
    return torch.tensor(value, dtype=torch.int64)


def _build(
    job: Job,
    wanted: Mapping[str, tuple[SiteSpec, torch.Tensor]],
    again: Mapping[str, str],
    builder: Builder,
) -> None:
    for second, first in again.items():
        if not torch.equal(job.tensor(second), job.tensor(first)):
            raise AdapterRejectedError(
                "bad_config", f"{second} and {first} differ, and the base ties the two"
            )
    for name, (site, ids) in wanted.items():
        ascending, order = torch.sort(ids)
        vectors = job.tensor(name)[order]
        builder.rows(site, ascending, vectors * site.scale, name)
        for head in job.base.sites.values():
            if head.tied_to == site.name:
                builder.rows(head, ascending, vectors, name)
