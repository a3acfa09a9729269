"""Describes a loaded transformers model to the adapter importers, and finds its modules by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manyhats.adapters.parts import BaseSpec, SiteKind, SiteSpec
from manyhats.engine.attention import AttentionShape
from manyhats.engine.model.norms import norm_kind
from manyhats.engine.model.wiring import Blocks

_FIXED_ROTATIONS = frozenset({"default", "linear", "llama3"})


def describe(
    model: PreTrainedModel,
    digest: str,
    layers: Sequence[tuple[nn.Module, AttentionShape]] = (),
    blocks: Blocks | None = None,
) -> BaseSpec:
    """The model's sites in its own order: linear layers, norms, embeddings, the head and, as far as
    ``layers`` and ``blocks`` tell of them, attention and residual sites.

    Biases are copied to the CPU in fp32 (adapters that train biases are kept as differences to
    them).
    """
    head = model.get_output_embeddings()
    attention = {id(module): shape for module, shape in layers}
    rotary = _rotary(model)
    sites: dict[str, SiteSpec] = {}
    for name, module in model.named_modules():
        shape = attention.get(id(module))
        if shape is not None:
            site: SiteSpec | None = SiteSpec(
                name,
                SiteKind.ATTENTION,
                shape.kv_heads,
                shape.head_dim,
                rotary=rotary if shape.sliding_window is None else None,
            )
        else:
            site = _site(name, module, is_head=module is head)
        if site is not None:
            sites[name] = site
        if module is head:
            sites[name] = replace(sites[name], tied_to=_shared_with(head, model))
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    for name in blocks or ():
        sites[name] = SiteSpec(name, SiteKind.RESIDUAL, hidden, hidden)
    return BaseSpec(digest=digest, num_layers=int(config.num_hidden_layers), sites=sites)


def site_modules(model: PreTrainedModel, spec: BaseSpec) -> Mapping[str, nn.Module]:
    """The module of each site that is one (residual sites are not)."""
    modules = dict(model.named_modules())
    return {
        name: modules[name]
        for name, site in spec.sites.items()
        if site.kind is not SiteKind.RESIDUAL
    }


def _rotary(model: PreTrainedModel) -> torch.Tensor | None:
    """The frequencies of the one module that rotates, unless they depend on the length."""
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if len(found) != 1:
        return None
    module: Any = found[0]
    fixed = getattr(module, "rope_type", None) in _FIXED_ROTATIONS
    if not fixed or getattr(module, "attention_scaling", 1.0) != 1.0:
        return None
    frequencies: torch.Tensor = module.inv_freq.detach().float().cpu().clone()
    return frequencies


def _shared_with(head: Any, model: PreTrainedModel) -> str | None:
    """The embedding whose weight the head has, if any."""
    embeddings = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    return next((name for name, module in embeddings if module.weight is head.weight), None)


def _site(name: str, module: Any, *, is_head: bool) -> SiteSpec | None:
    bias = getattr(module, "bias", None)
    bias = bias.detach().float().cpu().clone() if isinstance(bias, torch.Tensor) else None
    if isinstance(module, Conv1D):
        return SiteSpec(name, SiteKind.LINEAR, int(module.nx), int(module.nf), True, bias)
    if isinstance(module, nn.Linear):
        kind = SiteKind.HEAD if is_head else SiteKind.LINEAR
        return SiteSpec(name, kind, module.in_features, module.out_features, False, bias)
    if isinstance(module, nn.Embedding):
        ids, size = module.num_embeddings, module.embedding_dim
        return SiteSpec(name, SiteKind.EMBEDDING, ids, size, scale=_embedding_scale(module))
    if "Norm" in type(module).__name__ and isinstance(
        getattr(module, "weight", None), torch.Tensor
    ):
        size = int(module.weight.numel())
        norm, offset = norm_kind(module)
        return SiteSpec(name, SiteKind.NORM, size, size, False, bias, offset=offset, norm=norm)
    return None


def _embedding_scale(module: Any) -> float:
    """What the module multiplies its rows by, rounded as it rounds it."""
    scale = getattr(module, "embed_scale", 1.0)
    return float(torch.as_tensor(scale).to(module.weight.dtype))
