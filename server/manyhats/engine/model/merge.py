"""Merges an adapter into the weights of a plain model: each part where a weight can take it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from manyhats.adapters.parts import BaseSpec, CompiledAdapter, SiteKind, SiteParts, SiteSpec
from manyhats.engine.model.spec import site_modules
from manyhats.errors import AdapterRejectedError

_NO_WEIGHT: Final = {
    "bottlenecks": "a network of its own beside the base's modules",
    "fusion": "an attention over networks beside the base's modules",
    "prefix": "keys and values before every sequence",
    "soft_prompt": "vectors before every prompt",
}
"""The parts that no weight of the base can take in, and what they are."""


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, spec: BaseSpec, adapter: CompiledAdapter) -> None:
    """Changes the weights of ``model``, a plain one that ``spec`` describes, to those of the model
    that wears ``adapter``; computed in fp32, kept in the model's dtype.

    A head and an embedding that share their weight are separated where the adapter changes one.

    Raises:
        AdapterRejectedError: ``cannot_merge``, before anything is changed: parts that are no change
            of a weight, and biases where the base has none.
    """
    modules = site_modules(model, spec)
    for name, parts in adapter.sites.items():
        _check(spec.sites[name], modules.get(name), parts)
    _separate(model, spec, adapter.sites)
    for name, parts in adapter.sites.items():
        site = spec.sites[name]
        _MERGES[site.kind](site, modules[name], parts)


def _check(site: SiteSpec, module: nn.Module | None, parts: SiteParts) -> None:
    for part, what in _NO_WEIGHT.items():
        if getattr(parts, part) not in (None, ()):
            raise AdapterRejectedError(
                "cannot_merge", f"{site.name}: {part} cannot be merged: {what}", param="adapter"
            )
    # The model's configuration could not say that there is a bias, so nobody would load it.
    if parts.bias is not None and getattr(module, "bias", None) is None:
        raise AdapterRejectedError(
            "cannot_merge",
            f"{site.name}: a bias cannot be merged where the base has none",
            param="adapter",
        )


def _separate(model: PreTrainedModel, spec: BaseSpec, changed: Mapping[str, SiteParts]) -> None:
    for site in spec.sites.values():
        if site.tied_to is not None and (site.name in changed or site.tied_to in changed):
            head: Any = site_modules(model, spec)[site.name]
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
            model.config.get_text_config().tie_word_embeddings = False


def _linear(site: SiteSpec, module: Any, parts: SiteParts) -> None:
    own = module.weight.t() if site.transposed else module.weight
    weight = own.float().cpu() if parts.dense is None else parts.dense.float().clone()
    if parts.rows is not None:
        weight[parts.rows.token_ids] = parts.rows.vectors.float()
    if parts.low_rank is not None:
        weight = weight + parts.low_rank.b.float().t() @ parts.low_rank.a.float()
    if parts.input_scale is not None:
        weight = weight * parts.input_scale.float()
    bias = None if module.bias is None else module.bias.float().cpu()
    if parts.output_scale is not None:
        scale = parts.output_scale.float()
        weight = weight * scale[:, None]
        bias = None if bias is None else bias * scale
    if parts.bias is not None and bias is not None:
        bias = bias + parts.bias.float()
    module.weight.copy_(weight.t() if site.transposed else weight)
    if bias is not None:
        module.bias.copy_(bias)


def _norm(site: SiteSpec, module: Any, parts: SiteParts) -> None:
    if parts.gain is not None:
        module.weight.copy_(parts.gain.float() - site.offset)
    if parts.bias is not None:
        module.bias.copy_(module.bias.float().cpu() + parts.bias.float())


def _embedding(site: SiteSpec, module: Any, parts: SiteParts) -> None:
    """Of a base that scales its embeddings the parts are scaled already."""
    own = module.weight.float().cpu() * site.scale
    weight = own if parts.dense is None else parts.dense.float().clone()
    if parts.rows is not None:
        weight[parts.rows.token_ids] = parts.rows.vectors.float()
    if parts.low_rank is not None:
        weight = weight + parts.low_rank.a.float().t() @ parts.low_rank.b.float()
    module.weight.copy_(weight / site.scale)


_MERGES: Final[Mapping[SiteKind, Callable[[SiteSpec, Any, SiteParts], None]]] = {
    SiteKind.LINEAR: _linear,
    SiteKind.HEAD: _linear,
    SiteKind.NORM: _norm,
    SiteKind.EMBEDDING: _embedding,
}
