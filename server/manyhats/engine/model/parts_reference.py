"""The plainest application of a compiled adapter to a transformers model: what the parts mean.

Forward hooks over the model's own modules, in the model's dtype, one sequence, no cache between
calls. It is the oracle of the importers and of the engine, and slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from manyhats.adapters.parts import BaseSpec, CompiledAdapter, SiteKind, SiteParts, SiteSpec
from manyhats.engine.model.stream_reference import with_stream_parts


class PartsReference:
    """A model that wears one adapter while it is asked.

    ``model`` is a plain transformers model (its own attention, not quantized) that ``spec``
    describes; it is as it was between calls.
    """

    def __init__(self, model: PreTrainedModel, spec: BaseSpec, adapter: CompiledAdapter) -> None:
        self._model = model
        self._spec = spec
        self._adapter = adapter

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of every token given, [tokens, vocabulary], fp32."""
        ids = torch.tensor([list(token_ids)])
        with self._worn():
            soft = self._soft_prompt()
            if soft is None:
                cache = self._prefix_cache()
                out = self._model(input_ids=ids, past_key_values=cache)
            else:
                embeds = self._model.get_input_embeddings()(ids)
                out = self._model(inputs_embeds=torch.cat([soft[None].to(embeds), embeds], dim=1))
        logits: torch.Tensor = out.logits[0, -len(token_ids) :].float()
        return logits

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely tokens after ``token_ids``, one after the other."""
        ids = list(token_ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(token_ids) :]

    def _soft_prompt(self) -> torch.Tensor | None:
        return next(
            (p.soft_prompt for p in self._adapter.sites.values() if p.soft_prompt is not None), None
        )

    def _prefix_cache(self) -> DynamicCache | None:
        prefixes = {
            name: parts.prefix
            for name, parts in self._adapter.sites.items()
            if parts.prefix is not None
        }
        if not prefixes:
            return None
        cache = DynamicCache(config=self._model.config)
        modules = dict(self._model.named_modules())
        for name, prefix in prefixes.items():
            # [tokens, heads, dim] -> [1, heads, tokens, dim]
            k, v = (t.transpose(0, 1)[None].to(self._model.dtype) for t in (prefix.k, prefix.v))
            layer: Any = modules[name]
            cache.update(k, v, int(layer.layer_idx))
        return cache

    def _worn(self) -> AbstractContextManager[None]:
        return wearing(self._model, self._spec, self._adapter)


@contextmanager
def wearing(model: PreTrainedModel, spec: BaseSpec, adapter: CompiledAdapter) -> Iterator[None]:
    """The model's modules do what the adapter's parts say, all but prefixes and soft prompts.

    Hooks around the modules' calls, whatever their forwards are. The parts are on its device.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name, parts in adapter.sites.items():
            site = spec.sites[name]
            if site.kind is SiteKind.RESIDUAL:
                stack.enter_context(with_stream_parts(model, name, parts))
                continue
            module = modules[name]
            if site.kind is SiteKind.NORM:
                stack.enter_context(_with_gain(site, module, parts))
            elif site.kind is SiteKind.EMBEDDING:
                hook = partial(_embedding, parts)
                stack.callback(module.register_forward_hook(hook).remove)
            elif site.kind in (SiteKind.LINEAR, SiteKind.HEAD):
                stack.enter_context(_linear_hooks(site, module, parts))
        yield


@contextmanager
def _with_gain(site: SiteSpec, module: Any, parts: SiteParts) -> Iterator[None]:
    own = module.weight.data
    if parts.gain is not None:
        module.weight.data = (parts.gain.float() - site.offset).to(own)
    bias = parts.bias
    hook = module.register_forward_hook(lambda _m, _x, y: y if bias is None else y + bias.to(y))
    try:
        yield
    finally:
        module.weight.data = own
        hook.remove()


@contextmanager
def _linear_hooks(site: SiteSpec, module: nn.Module, parts: SiteParts) -> Iterator[None]:
    def scale(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args if parts.input_scale is None else (args[0] * parts.input_scale, *args[1:])

    before = module.register_forward_pre_hook(scale)
    after = module.register_forward_hook(partial(_linear, site, parts))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _linear(
    site: SiteSpec, parts: SiteParts, module: Any, args: tuple[torch.Tensor], y: torch.Tensor
) -> torch.Tensor:
    """``args[0]`` is scaled already."""
    x = args[0]
    if parts.dense is not None:
        y = functional.linear(x, parts.dense.to(x), module.bias)
    if parts.rows is not None:
        y = y.clone()
        y[..., parts.rows.token_ids] = functional.linear(x, parts.rows.vectors.to(x))
        if module.bias is not None:
            y[..., parts.rows.token_ids] += module.bias[parts.rows.token_ids]
    if parts.low_rank is not None:
        y = y + (x @ parts.low_rank.a.to(x).t()) @ parts.low_rank.b.to(x)
    if parts.output_scale is not None:
        y = y * parts.output_scale
    return y if parts.bias is None else y + parts.bias


def _embedding(
    parts: SiteParts,
    _module: nn.Module,
    args: tuple[torch.Tensor],
    y: torch.Tensor,
) -> torch.Tensor:
    ids = args[0]
    if parts.dense is not None:
        y = parts.dense[ids].to(y)
    if parts.rows is not None:
        y = y.clone()
        for token_id, vector in zip(parts.rows.token_ids, parts.rows.vectors, strict=True):
            y[ids == token_id] = vector.to(y)
    if parts.low_rank is not None:
        y = y + parts.low_rank.a.t()[ids].to(y) @ parts.low_rank.b.to(y)
    return y
