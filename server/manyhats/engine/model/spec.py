"""Describes a loaded transformers model to the adapter importers, and finds its modules by site."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manyhats.adapters.parts import BaseSpec, SiteKind, SiteSpec


def describe(model: PreTrainedModel, digest: str) -> BaseSpec:
    """The model's sites in its own order: linear layers, norms, embeddings, attentions, the head.

    Biases are copied to the CPU in fp32 (adapters that train biases are kept as differences to
    them).
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    sites: dict[str, SiteSpec] = {}
    for name, module in model.named_modules():
        site = _site(name, module, config)
        if site is not None:
            sites[name] = _as_head(site, module, model, sites) if module is head else site
    return BaseSpec(digest=digest, num_layers=int(config.num_hidden_layers), sites=sites)


def site_modules(model: PreTrainedModel, spec: BaseSpec) -> Mapping[str, nn.Module]:
    """Each site's module; a place in the residual stream has none."""
    modules = dict(model.named_modules())
    return {name: modules[name] for name in spec.sites if name in modules}


def _as_head(
    site: SiteSpec, module: Any, model: PreTrainedModel, sites: Mapping[str, SiteSpec]
) -> SiteSpec:
    modules = dict(model.named_modules())
    shared = (
        name
        for name, other in sites.items()
        if other.kind is SiteKind.EMBEDDING and _weight(modules[name]) is module.weight
    )
    return replace(site, kind=SiteKind.HEAD, tied_to=next(shared, None))


def _weight(module: Any) -> object:
    return module.weight


def _site(name: str, module: Any, config: Any) -> SiteSpec | None:
    bias = getattr(module, "bias", None)
    bias = bias.detach().float().cpu().clone() if isinstance(bias, torch.Tensor) else None
    if isinstance(module, Conv1D):
        return SiteSpec(name, SiteKind.LINEAR, int(module.nx), int(module.nf), True, bias)
    if isinstance(module, nn.Linear):
        return SiteSpec(name, SiteKind.LINEAR, module.in_features, module.out_features, False, bias)
    if isinstance(module, nn.Embedding):
        scale = float(torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(module.weight.dtype))
        shape = module.num_embeddings, module.embedding_dim
        return SiteSpec(name, SiteKind.EMBEDDING, *shape, scale=scale)
    if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return SiteSpec(name, SiteKind.ATTENTION, int(kv_heads), int(head_dim))
    if "Norm" in type(module).__name__ and isinstance(
        getattr(module, "weight", None), torch.Tensor
    ):
        size = int(module.weight.numel())
        offset = _offset(module)
        return SiteSpec(name, SiteKind.NORM, size, size, False, bias, offset=offset)
    return None


@torch.no_grad()
def _offset(module: nn.Module) -> float:
    """What a norm adds to its weight: its output where the weight is zero (Gemma's adds 1).

    The input is one and minus one by turns, which every norm leaves as it is.
    """
    bare: Any = copy.deepcopy(module)
    for parameter in bare.parameters():
        parameter.zero_()
    size = bare.weight.numel()
    x = torch.ones(1, size, dtype=bare.weight.dtype, device=bare.weight.device)
    x[:, 1::2] = -1
    return float(torch.round((bare(x) * x).float().mean()))
