"""Puts our attention into a model; finds out by a probe what its cache must hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from manyhats.engine.attention import AttentionShape, PagedAttention
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
    """Records the shapes and refuses what the paged attention cannot honour; answers zeros."""
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
    return torch.zeros_like(query).transpose(1, 2), None


# No mask is registered: transformers then makes none. Its making of one would read back from the
# device whether several sequences are packed, in every step, and no CUDA graph could hold it.
AttentionInterface.register(IMPLEMENTATION, _paged)
AttentionInterface.register(_PROBE, _probe)


@torch.inference_mode()
def probe_attention(model: PreTrainedModel) -> list[tuple[nn.Module, AttentionShape]]:
    """The model's attention modules in order, with what each one's cache must hold.

    Runs two tokens through the model with a recording attention. Raises ConfigError where the
    architecture does not go through transformers' attention interface in every layer, or asks of it
    what ours cannot do.
    """
    model.set_attn_implementation(_PROBE)
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=ids[0, :1])
    found = [(m, m.manyhats_shape) for m in model.modules() if hasattr(m, "manyhats_shape")]
    layers = int(model.config.get_text_config().num_hidden_layers)
    if len(found) != layers:
        raise ConfigError(
            f"model: {type(model).__name__} sends {len(found)} of its {layers} layers through the "
            "attention interface; only decoder-only models that send all of them are served",
            param="model",
        )
    model.set_attn_implementation(IMPLEMENTATION)
    return found
