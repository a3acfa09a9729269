"""All layers of a Llama-shaped model as plain weights, for a backend that runs them in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.groups import MatrixGroup, SiteGroup
from manyhats_kernels.stack_parts import LayerParts, StackParts

MAX_HEAD_DIM = 256


@dataclass(frozen=True, eq=False)
class StackLayer:
    """One layer: norm, q k v, rotary embedding, attention, o; norm, gate and up, SiLU, down.

    Norms are root-mean-square norms with a weight, [hidden]; ``q_norm`` and ``k_norm``, [head_dim],
    come before the rotation where there are any. ``adapters``: the low-rank pools of the same
    matrices in the same groups, none where the model has none. The caches have the backend's own
    layout. ``sliding_window`` in tokens, None: full.
    """

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: MatrixGroup
    o: MatrixGroup
    gate_up: MatrixGroup
    down: MatrixGroup
    adapters: tuple[SiteGroup, SiteGroup, SiteGroup, SiteGroup] | None
    k_cache: Tensor
    v_cache: Tensor
    sliding_window: int | None


class LayerStack:
    """The layers in order and the sizes they share; ``descriptor`` and ``shape`` are what native
    code reads.

    Raises ValueError, naming what is wrong, where the layers are not of one shape or not bf16.
    """

    def __init__(
        self,
        layers: Sequence[StackLayer],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        eps: float,
        head_eps: float,
    ) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("a stack needs at least one layer")
        first = self.layers[0]
        self.hidden = first.qkv.in_features
        self.inner = first.down.in_features
        self.head_dim, self.scale, self.eps, self.head_eps = head_dim, scale, eps, head_eps
        if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM or heads % kv_heads:
            raise ValueError(
                f"head_dim {head_dim} must be even and at most {MAX_HEAD_DIM}, and {heads} heads a "
                f"multiple of {kv_heads}"
            )
        widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self._widths = widths
        fields: list[int] = []
        for number, layer in enumerate(self.layers):
            self._check(number, layer, widths)
            fields += _fields(layer)
        self.block_size = int(first.k_cache.shape[2])
        self.num_blocks = int(first.k_cache.shape[0])
        self.num_slots = min(
            (g.num_slots for layer in self.layers for g in layer.adapters or ()), default=0
        )
        sizes = (self.hidden, heads, kv_heads, head_dim, self.inner, self.block_size)
        self.shape = (ctypes.c_int64 * 7)(*sizes, len(self.layers))
        self.descriptor = (ctypes.c_int64 * len(fields))(*fields)

    def parts(self, layers: Sequence[LayerParts]) -> StackParts:
        """What adapters do beside low-rank products in each of the layers.

        Raises ValueError, naming what is wrong, where it does not fit.
        """
        if len(layers) != len(self.layers):
            raise ValueError(f"parts of {len(layers)} layers, the stack has {len(self.layers)}")
        hidden, inner, (q, k, v) = self.hidden, self.inner, self._widths
        linear = [(hidden, q), (hidden, k), (hidden, v), (q, hidden)]
        linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
        return StackParts(layers, linear, self.num_slots)

    def _check(self, number: int, layer: StackLayer, widths: tuple[int, int, int]) -> None:
        hidden, inner, dim = self.hidden, self.inner, self.head_dim
        wanted = {
            "qkv": (layer.qkv, hidden, widths),
            "o": (layer.o, widths[0], (hidden,)),
            "gate_up": (layer.gate_up, hidden, (inner, inner)),
            "down": (layer.down, inner, (hidden,)),
        }
        for i, (name, (group, inputs, outs)) in enumerate(wanted.items()):
            if (group.in_features, group.outs) != (inputs, outs):
                raise ValueError(
                    f"layer {number}: {name} is {group.in_features} to {group.outs}, not {inputs} "
                    f"to {outs}"
                )
            own = layer.adapters[i] if layer.adapters is not None else None
            if own is not None and (own.in_features, own.outs) != (inputs, outs):
                raise ValueError(f"layer {number}: the adapters of {name} do not fit it")
            if own is not None and own.dtype != torch.bfloat16:
                raise ValueError(f"layer {number}: the adapters of {name} are {own.dtype}")
        blocks, _, size, _ = self.layers[0].k_cache.shape
        cache = (int(blocks), widths[1] // dim, int(size), dim)
        tensors = {
            "input_norm": (layer.input_norm, (hidden,)),
            "post_norm": (layer.post_norm, (hidden,)),
            "q_norm": (layer.q_norm, (dim,)),
            "k_norm": (layer.k_norm, (dim,)),
            "k_cache": (layer.k_cache, cache),
            "v_cache": (layer.v_cache, cache),
        }
        for name, (tensor, shape) in tensors.items():
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.dtype != torch.bfloat16:
                raise ValueError(
                    f"layer {number}: {name} must be {list(shape)} of bf16, got "
                    f"{list(tensor.shape)} of {tensor.dtype}"
                )
            if not tensor.is_contiguous() or not tensor.is_cpu:
                raise ValueError(f"layer {number}: {name} must be contiguous and on the CPU")

    def check(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBatch,
        adapters: AdapterBatch,
    ) -> None:
        """Raise ValueError, naming what is wrong, unless the arguments fit the stack."""
        tokens = attention.num_tokens
        for name, tensor, width in (
            ("hidden", hidden, self.hidden),
            ("cos", cos, self.head_dim),
            ("sin", sin, self.head_dim),
        ):
            fits = tensor.shape == (tokens, width) and tensor.dtype == torch.bfloat16
            if not fits or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be [{tokens}, {width}] of bf16, contiguous, got "
                    f"{list(tensor.shape)} of {tensor.dtype}"
                )
        if attention.block_size != self.block_size or attention.max_block >= self.num_blocks:
            raise ValueError(
                f"the batch has blocks of {attention.block_size} up to number "
                f"{attention.max_block}, the cache {self.num_blocks} of {self.block_size}"
            )
        if adapters.num_tokens != tokens:
            raise ValueError(f"{adapters.num_tokens} tokens wear adapters, {tokens} attend")
        if adapters.segments and adapters.num_slots > self.num_slots:
            raise ValueError(f"rows cover {self.num_slots} slots, the batch {adapters.num_slots}")


@runtime_checkable
class StackRunner(Protocol):
    """A backend that runs a step through all layers in one call."""

    @property
    def stacks_prompts(self) -> bool:
        """Whether sequences of many new tokens are no slower so than by single calls."""

    def run_stack(
        self,
        hidden: Tensor,
        stack: LayerStack,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBatch,
        adapters: AdapterBatch,
        parts: StackParts | None = None,
    ) -> None:
        """The residual stream ``hidden`` [T, hidden], bf16, goes through the layers, in place.

        ``cos`` and ``sin`` are [T, head_dim], as transformers' rotary embedding gives them for the
        tokens' positions. ``parts``: what the worn adapters do beside low-rank products, None where
        they do nothing else. Keys and values go to the caches. Every operation and every rounding
        is that of the backend's single calls, so the bits are too. The model's last norm is not in
        it. Raises ValueError on arguments that do not fit and where a worn slot's rank rows lie
        outside of their pool.
        """


def _fields(layer: StackLayer) -> list[int]:
    tensors = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
    groups = (layer.qkv, layer.o, layer.gate_up, layer.down)
    adapters = layer.adapters or (None,) * len(groups)
    return [
        *(0 if t is None else t.data_ptr() for t in tensors),
        *(ctypes.addressof(group.descriptor) for group in groups),
        *(0 if group is None else ctypes.addressof(group.descriptor) for group in adapters),
        layer.k_cache.data_ptr(),
        layer.v_cache.data_ptr(),
        layer.sliding_window or 0,
    ]
