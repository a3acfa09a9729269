"""transformers' own model, one sequence at a time, with hooks that do the arithmetic of each part
as ``adapters/parts.py`` defines it. Nothing of the engine is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from manyhats.adapters.parts import (
    Activation,
    BaseSpec,
    Bottleneck,
    CompiledAdapter,
    SiteKind,
    SiteParts,
)

_ACTIVATIONS = {
    Activation.RELU: torch.relu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda z: functional.gelu(z, approximate="tanh"),
    Activation.SILU: functional.silu,
    Activation.TANH: torch.tanh,
    Activation.LEAKY_RELU: functional.leaky_relu,
    Activation.IDENTITY: lambda z: z,
}


class Oracle:
    """Logits and greedy tokens of ``model`` wearing an adapter."""

    def __init__(self, model: PreTrainedModel, spec: BaseSpec) -> None:
        self._model = model.eval()
        self._spec = spec
        self._modules = dict(model.named_modules())

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], adapter: CompiledAdapter | None) -> torch.Tensor:
        """[tokens, V]: the logits behind each of the prompt's own tokens."""
        if adapter is None:
            return self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        virtual = adapter.virtual_tokens
        prefixes = [p.prefix for p in adapter.sites.values() if p.prefix is not None]
        with self._worn(adapter):
            if prefixes:
                cache = DynamicCache()
                for layer, prefix in enumerate(prefixes):
                    cache.update(
                        prefix.k.transpose(0, 1)[None], prefix.v.transpose(0, 1)[None], layer
                    )
                positions = torch.arange(virtual, virtual + len(tokens))[None]
                return self._model(
                    torch.tensor([tokens]), position_ids=positions, past_key_values=cache
                ).logits[0]
            ids = torch.tensor([[7] * virtual + list(tokens)])
            return self._model(ids, use_cache=False).logits[0, virtual:]

    def greedy(
        self, prompt: Sequence[int], adapter: CompiledAdapter | None, count: int
    ) -> tuple[list[int], list[torch.Tensor]]:
        """The tokens, and the log-probabilities [V] that each was chosen from."""
        tokens, scores = list(prompt), []
        for _ in range(count):
            scores.append(torch.log_softmax(self.logits(tokens, adapter)[-1].float(), -1))
            tokens.append(int(scores[-1].argmax()))
        return tokens[len(prompt) :], scores

    @contextmanager
    def _worn(self, adapter: CompiledAdapter) -> Iterator[None]:
        handles: list[Any] = []
        for name, parts in adapter.sites.items():
            kind = self._spec.sites[name].kind
            if kind is SiteKind.RESIDUAL:
                handles += self._residual(name, parts)
            elif kind is not SiteKind.ATTENTION:
                work = {
                    SiteKind.LINEAR: _linear,
                    SiteKind.HEAD: _linear,
                    SiteKind.NORM: _norm,
                    SiteKind.EMBEDDING: _embedding,
                }[kind]
                module = self._modules[name]
                handles.append(
                    module.register_forward_hook(
                        lambda m, a, y, w=work, p=parts: w(m, p, a[0]), always_call=False
                    )
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _residual(self, name: str, parts: SiteParts) -> list[Any]:
        layer_name, _, place = name.rpartition(".")
        layer = self._modules[layer_name]
        after_mlp = place == "after_mlp"
        entry, block = _blocks(layer)[after_mlp]
        stream: list[torch.Tensor] = []
        keep = entry.register_forward_pre_hook(lambda m, a: stream.append(a[0]))
        if after_mlp:  # the layer's own output is the stream after the block

            def end(_m: nn.Module, _a: Any, h: Any) -> Any:
                r = stream.pop()
                return _bottlenecks(parts, r, h - r)

            return [keep, layer.register_forward_hook(end)]

        def leave(_m: nn.Module, _a: Any, y: Any) -> Any:
            r = stream.pop()
            o = y[0] if isinstance(y, tuple) else y
            o = _bottlenecks(parts, r, o) - r
            return (o, *y[1:]) if isinstance(y, tuple) else o

        return [keep, block.register_forward_hook(leave)]


def _blocks(layer: Any) -> tuple[tuple[nn.Module, nn.Module], tuple[nn.Module, nn.Module]]:
    kind = type(layer).__name__
    if kind == "GPT2Block":
        return (layer.ln_1, layer.attn), (layer.ln_2, layer.mlp)
    if kind == "Gemma3DecoderLayer":
        return (
            (layer.input_layernorm, layer.post_attention_layernorm),
            (layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm),
        )
    return (
        (layer.input_layernorm, layer.self_attn),
        (layer.post_attention_layernorm, layer.mlp),
    )


def _bottlenecks(parts: SiteParts, r: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """The stream after the block."""
    if parts.fusion is not None:
        f = parts.fusion
        d = torch.stack([_bottleneck(b, _reads(b, r, o)) for b in parts.bottlenecks], -2)
        x = _reads(parts.bottlenecks[-1], r, o)
        q = x @ f.query.T + f.query_bias
        k = d @ f.key.T + f.key_bias
        p = torch.softmax((k * q[..., None, :]).sum(-1) / f.temperature, -1)
        value = d if f.value is None else d @ f.value.T
        return r + o + (p[..., None] * value).sum(-2)
    for b in parts.bottlenecks:
        d = _bottleneck(b, _reads(b, r, o))
        o = o + d if b.skip else d - r
    return r + o


def _reads(b: Bottleneck, r: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    return r if b.parallel else o if b.of_output else r + o


def _bottleneck(b: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    z = x @ b.down.T + (0 if b.down_bias is None else b.down_bias)
    d = _ACTIVATIONS[b.activation](z) @ b.up + (0 if b.up_bias is None else b.up_bias)
    return d if b.gate is None else d * torch.sigmoid(x @ b.gate + b.gate_bias)[..., None]


def _linear(module: Any, parts: SiteParts, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    weight = weight.clone() if parts.dense is None else parts.dense
    if parts.rows is not None:
        weight[parts.rows.token_ids] = parts.rows.vectors
    if parts.input_scale is not None:
        x = x * parts.input_scale
    y = x @ weight.T
    if module.bias is not None:
        y = y + module.bias
    if parts.low_rank is not None:
        y = y + (x @ parts.low_rank.a.T) @ parts.low_rank.b
    if parts.output_scale is not None:
        y = y * parts.output_scale
    return y if parts.bias is None else y + parts.bias


def _norm(module: Any, parts: SiteParts, x: torch.Tensor) -> torch.Tensor:
    gain = parts.gain
    if isinstance(module, nn.LayerNorm):
        weight = module.weight if gain is None else gain
        y = functional.layer_norm(x, weight.shape, weight, module.bias, module.eps)
    else:
        gemma = "Gemma" in type(module).__name__
        if gain is None:
            gain = module.weight + 1 if gemma else module.weight
        eps = module.eps if gemma else module.variance_epsilon
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain
    return y if parts.bias is None else y + parts.bias


def _embedding(module: Any, parts: SiteParts, ids: torch.Tensor) -> torch.Tensor:
    scale = float(getattr(module, "embed_scale", 1.0))
    weight = module.weight * scale if parts.dense is None else parts.dense
    if parts.rows is not None:
        weight[parts.rows.token_ids] = parts.rows.vectors
    if parts.low_rank is not None:
        weight = weight + parts.low_rank.a.T @ parts.low_rank.b
    y = functional.embedding(ids, weight)
    if parts.soft_prompt is not None:
        y[:, : len(parts.soft_prompt)] = parts.soft_prompt
    return y
