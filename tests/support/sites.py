"""Describes a model without putting our attention into it."""

from __future__ import annotations

from transformers import PreTrainedModel

from manyhats.adapters.parts import BaseSpec
from manyhats.engine.model.attention import probe
from manyhats.engine.model.spec import describe


def describe_plain(model: PreTrainedModel, digest: str = "0" * 64) -> BaseSpec:
    """Every site, as the server sees them; the model keeps transformers' own attention."""
    own = model.config._attn_implementation
    probed = probe(model)
    model.set_attn_implementation(own)
    return describe(model, digest, probed.layers, probed.blocks)
