"""Puts our attention into a model; finds out by a probe what its cache must hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from manyhats.engine.attention import AttentionShape, PagedAttention
from manyhats.engine.model.inputs import SharedInputs, watch_inputs
from manyhats.engine.model.wiring import Blocks, watch
from manyhats.errors import ConfigError

IMPLEMENTATION = "manyhats"
_PROBE = "manyhats_probe"
_HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "cache_position",
        "is_causal",
    }
)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


def _paged(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    attention: PagedAttention = module.manyhats_attention  # type: ignore[assignment]
    return attention(query, key, value, scaling, sliding_window, softcap), None


def _probe(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Records the shapes and refuses what the paged attention cannot honour.

    Answers the queries themselves, so that there is something to see of what follows.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise ConfigError(
            f"model: {type(module).__name__} passes {', '.join(unknown)} to its attention, which "
            "is not "
            "supported",
            param="model",
        )
    if getattr(module, "is_causal", True) is False:
        raise ConfigError(f"model: {type(module).__name__} is not causal", param="model")
    if key.shape[-1] != value.shape[-1]:
        raise ConfigError(
            "model: keys and values of different sizes are not supported", param="model"
        )
    module.manyhats_shape = AttentionShape(  # type: ignore[assignment]
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[-1],
        sliding_window=sliding_window,
    )
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _paged)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(_PROBE, _no_mask)


@dataclass(frozen=True, slots=True)
class Probed:
    """``layers``: the attention modules in order, with what each one's cache must hold;
    ``blocks``: the places of the residual sites, as far as they are known; ``shared``: which linear
    layers read the same input.
    """

    layers: list[tuple[nn.Module, AttentionShape]]
    blocks: Blocks
    shared: SharedInputs


@torch.inference_mode()
def probe(model: PreTrainedModel) -> Probed:
    """Runs a few tokens through the model with a recording attention.

    Raises ConfigError where the architecture does not go through transformers' attention interface
    in every layer, or asks of it what ours cannot do.
    """
    model.set_attn_implementation(_PROBE)
    config = model.config.get_text_config()
    heads = {config.num_attention_heads, getattr(config, "num_key_value_heads", None)}
    tokens = next(count for count in (2, 3, 4) if count not in heads)
    positions = torch.arange(tokens, device=model.device)[None]
    with watch(model, _layer_names(model), tokens) as blocks, watch_inputs(model) as shared:
        model(
            input_ids=positions,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=positions[0],
        )
    found = [(m, m.manyhats_shape) for m in model.modules() if hasattr(m, "manyhats_shape")]
    layers = int(config.num_hidden_layers)
    if len(found) != layers:
        raise ConfigError(
            f"model: {type(model).__name__} sends {len(found)} of its {layers} layers through the "
            "attention interface; only decoder-only models that send all of them are served",
            param="model",
        )
    model.set_attn_implementation(IMPLEMENTATION)
    return Probed(found, blocks, shared)


def _layer_names(model: PreTrainedModel) -> list[str]:
    """The layers' names: the members of the module list that is as long as the model is deep."""
    depth = int(model.config.get_text_config().num_hidden_layers)
    return [
        f"{name}.{index}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
        for index in range(depth)
    ]
