"""Describes a loaded transformers model to the adapter importers, and finds its modules by site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manyhats.adapters.parts import BaseSpec, SiteKind, SiteSpec


def describe(model: PreTrainedModel, digest: str) -> BaseSpec:
    """The model's sites in its own order: linear layers, norms, embeddings and the head.

    Biases are copied to the CPU in fp32 (adapters that train biases are kept as differences to
    them).
    """
    head = model.get_output_embeddings()
    sites: dict[str, SiteSpec] = {}
    for name, module in model.named_modules():
        site = _site(name, module, is_head=module is head)
        if site is not None:
            sites[name] = site
    return BaseSpec(
        digest=digest, num_layers=int(model.config.get_text_config().num_hidden_layers), sites=sites
    )


def site_modules(model: PreTrainedModel, spec: BaseSpec) -> Mapping[str, nn.Module]:
    """Each site's module."""
    modules = dict(model.named_modules())
    return {name: modules[name] for name in spec.sites}


def _site(name: str, module: Any, *, is_head: bool) -> SiteSpec | None:
    bias = getattr(module, "bias", None)
    bias = bias.detach().float().cpu().clone() if isinstance(bias, torch.Tensor) else None
    if isinstance(module, Conv1D):
        return SiteSpec(name, SiteKind.LINEAR, int(module.nx), int(module.nf), True, bias)
    if isinstance(module, nn.Linear):
        kind = SiteKind.HEAD if is_head else SiteKind.LINEAR
        return SiteSpec(name, kind, module.in_features, module.out_features, False, bias)
    if isinstance(module, nn.Embedding):
        return SiteSpec(name, SiteKind.EMBEDDING, module.num_embeddings, module.embedding_dim)
    if "Norm" in type(module).__name__ and isinstance(
        getattr(module, "weight", None), torch.Tensor
    ):
        size = int(module.weight.numel())
        return SiteSpec(name, SiteKind.NORM, size, size, False, bias)
    return None
