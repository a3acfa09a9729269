"""Steps of Llama-shaped bases on the CPU: all layers in one native call.

The layers' own modules take some forty calls a layer; between them the step thread waits for the
interpreter, which the event loop wants too. Which bases are so shaped is found by trying: a stack
serves only where it gives the very bits that the modules give. Steps whose adapters do what
``stack_parts`` leaves out go through the modules, and so do those with prompts in them where the
backend is quicker that way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from manyhats.engine.attention import AttentionShape, PagedAttention
from manyhats.engine.hooks import plain_forward
from manyhats.engine.model.fused import FusedGate, FusedNorm
from manyhats.engine.model.load import BaseModel
from manyhats.engine.pool import AdapterPool
from manyhats.engine.projections import matrix_group
from manyhats.engine.site_pool import SitePool
from manyhats.engine.stack_parts import LINEAR, LayerSites, PartsOfStack, layer_sites
from manyhats.engine.step import StepState
from manyhats_kernels import AdapterBatch, AttentionBatch, Backend
from manyhats_kernels.groups import MatrixGroup, SiteGroup
from manyhats_kernels.stack import LayerStack, StackLayer, StackRunner

logger = logging.getLogger(__name__)

_GROUPS = (LINEAR[:3], LINEAR[3:4], LINEAR[4:6], LINEAR[6:])
_TRIED_STEPS = 2
_TRIED_SEQUENCES = 2

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""ids [1, T], positions [1, T], wanted rows [T] -> logits [T, V]."""


class DecoderStack:
    """Runs steps; see ``runner.FastPath``. Used by the step thread alone."""

    def __init__(
        self,
        model: Any,
        stack: LayerStack,
        runner: StackRunner,
        head: nn.Module,
        parts: PartsOfStack | None,
        state: StepState,
    ) -> None:
        self._decoder = model
        self._stack = stack
        self._runner = runner
        self._head = head
        self._parts = parts
        self._state = state

    @property
    def takes_prompts(self) -> bool:
        """Where the backend is quicker so."""
        return self._runner.stacks_prompts

    def takes(self, sequences: int) -> bool:
        """Every step whose adapters do nothing in the layers that is not in a stack."""
        return self._parts is None or self._parts.takes(self._state)

    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        attention: AttentionBatch,
        adapters: AdapterBatch,
        wanted: np.ndarray,
    ) -> torch.Tensor:
        """Logits [rows, V] of the rows ``wanted`` of the running step, whose plans are given."""
        decoder = self._decoder
        stream: torch.Tensor = decoder.embed_tokens(torch.from_numpy(ids)[None])
        cos, sin = decoder.rotary_emb(stream, torch.from_numpy(positions)[None])
        hidden = stream[0]  # a copy of the table's rows, ours to change
        parts = self._parts.now(self._state) if self._parts is not None else None
        rotation = cos[0].contiguous(), sin[0].contiguous()
        self._runner.run_stack(hidden, self._stack, *rotation, attention, adapters, parts)
        normal: torch.Tensor = decoder.norm(stream)
        if wanted.size != ids.size or (np.diff(wanted) != 1).any():
            normal = normal[:, torch.from_numpy(wanted)]
        logits: torch.Tensor = self._head(normal)
        return logits[0]


def layer_stack(
    base: BaseModel, backend: Backend, pool: AdapterPool | None, state: StepState
) -> DecoderStack | None:
    """The stack of a base whose caches and hooks are in place, None where there cannot be one."""
    head: Any = base.module.get_output_embeddings()
    if not isinstance(backend, StackRunner) or base.dtype != torch.bfloat16 or head is None:
        return None
    decoder: Any = base.module.get_decoder()
    try:
        sites = layer_sites(decoder, base, pool)
        layers = _layers(decoder, base, backend, sites)
        if layers is None:
            return None
        norms = [plain_forward(layer.input_layernorm).eps for layer in decoder.layers]
        attention = decoder.layers[0].self_attn
        shape: AttentionShape = base.layers[0][1]
        q_norm = getattr(attention, "q_norm", None)
        stack = LayerStack(
            layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=float(attention.scaling),
            eps=norms[0],
            head_eps=plain_forward(q_norm).eps if q_norm is not None else 0.0,
        )
    except (AttributeError, ValueError) as error:
        logger.info("steps go through the modules: %s", error)
        return None
    parts = PartsOfStack(sites, pool, stack) if pool is not None else None
    return DecoderStack(decoder, stack, backend, head, parts, state)


def _layers(
    decoder: Any, base: BaseModel, backend: Backend, sites: Sequence[LayerSites]
) -> list[StackLayer] | None:
    made = []
    for layer, own, (attention, shape) in zip(decoder.layers, sites, base.layers, strict=True):
        norms = [plain_forward(m) for m in (layer.input_layernorm, layer.post_attention_layernorm)]
        heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        norms += [plain_forward(module) for module in heads if module is not None]
        if not all(isinstance(norm, FusedNorm) for norm in norms):
            return None
        if not isinstance(plain_forward(layer.mlp), FusedGate) or attention is not layer.self_attn:
            return None
        groups = [_group(layer, names, backend) for names in _GROUPS]
        qkv, o, gate_up, down = groups
        if qkv is None or o is None or gate_up is None or down is None:
            return None
        paged: PagedAttention = attention.manyhats_attention
        made.append(
            StackLayer(
                input_norm=layer.input_layernorm.weight.data,
                post_norm=layer.post_attention_layernorm.weight.data,
                q_norm=None if heads[0] is None else heads[0].weight.data,
                k_norm=None if heads[1] is None else heads[1].weight.data,
                qkv=qkv,
                o=o,
                gate_up=gate_up,
                down=down,
                adapters=_adapters(own.linear),
                k_cache=paged.k_cache,
                v_cache=paged.v_cache,
                sliding_window=shape.sliding_window,
            )
        )
    return made


def _group(layer: Any, names: Sequence[str], backend: Backend) -> MatrixGroup | None:
    modules = [layer.get_submodule(name) for name in names]
    return matrix_group(modules, [plain_forward(module) for module in modules], backend)


def _adapters(
    sites: Mapping[str, SitePool],
) -> tuple[SiteGroup, SiteGroup, SiteGroup, SiteGroup] | None:
    if not sites:
        return None
    qkv, o, gate_up, down = (
        SiteGroup([sites[name].weights for name in names]) for names in _GROUPS
    )
    return qkv, o, gate_up, down


@torch.inference_mode()
def agrees(
    stack: DecoderStack, modules: Forward, state: StepState, blocks: int, block_size: int
) -> bool:
    """Whether a few decode steps have the same bits both ways. Writes to the first cache blocks."""
    sequences = min(_TRIED_SEQUENCES, blocks)
    for position in range(min(_TRIED_STEPS, block_size)):
        ids = np.arange(sequences, dtype=np.int64) + 7 * position + 1
        positions = np.full(sequences, position, np.int64)
        attention = AttentionBatch.build(
            np.ones_like(ids), positions + 1, [[i] for i in range(sequences)], block_size
        )
        adapters = AdapterBatch.build(np.full(sequences, -1), 0)
        state.begin(attention, adapters, (), wanted=np.arange(sequences))
        try:
            ours = stack.run(ids, positions, attention, adapters, np.arange(sequences))
            theirs = modules(
                torch.from_numpy(ids)[None],
                torch.from_numpy(positions)[None],
                torch.arange(sequences),
            )
        finally:
            state.end()
        if not torch.equal(ours, theirs):
            return False
    return True
