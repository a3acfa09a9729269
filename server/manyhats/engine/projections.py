"""Linear layers that read the same input (q, k and v; gate and up), computed together.

The first of them to be called multiplies for all, base and adapters alike; the others hand out what
is there. So a step makes one native call where it would make three, and x is prepared once. A
backend that adds the low-rank products while it reads 4-bit weights is given both at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from manyhats.engine.hooks import Hook
from manyhats.engine.layers import AdaptedLayer
from manyhats.engine.model.fourbit import FourBitLinear
from manyhats.engine.model.inputs import SharedInputs
from manyhats.engine.site_pool import PoolGroup
from manyhats.engine.step import StepState
from manyhats_kernels import Backend
from manyhats_kernels.fourbit import FourBitWeight
from manyhats_kernels.groups import (
    AdaptedFourBit,
    DenseWeight,
    FusedFourBit,
    GroupedMatmul,
    MatrixGroup,
)


class Projections:
    """One group. ``layers``: the members' forwards until now, plain or adapted."""

    __slots__ = (
        "_adapted",
        "_all_adapted",
        "_base",
        "_bits",
        "_fused",
        "_matmul",
        "_matrices",
        "_outs",
        "_pools",
        "_x",
    )

    def __init__(
        self, layers: Sequence[Any], backend: Backend, matrices: MatrixGroup | None
    ) -> None:
        self._adapted = [layer for layer in layers if isinstance(layer, AdaptedLayer)]
        self._base = [layer.base if isinstance(layer, AdaptedLayer) else layer for layer in layers]
        self._all_adapted = len(self._adapted) == len(layers)
        self._bits = sum(layer.bit for layer in self._adapted)
        self._matmul = backend if isinstance(backend, GroupedMatmul) else None
        self._matrices = matrices
        self._pools = (
            PoolGroup([layer.pool for layer in self._adapted], backend) if self._adapted else None
        )
        self._fused = fused_products(self._base, self._pools, backend)
        self._x: torch.Tensor | None = None
        self._outs: list[torch.Tensor | None] = []

    @property
    def is_fused(self) -> bool:
        """Whether base and low-rank products are made in the same pass."""
        return self._fused is not None

    def take(self, x: torch.Tensor, index: int, state: StepState) -> torch.Tensor:
        """The output of member ``index`` for x: [..., in] -> [..., out]."""
        if x is not self._x or self._outs[index] is None:
            self._outs = list(self._compute(x, state))
            self._x = x
        out = self._outs[index]
        if out is None:
            raise RuntimeError("a group of projections gave no output")
        self._outs[index] = None
        if index == len(self._outs) - 1:
            self._x = None
        return out

    def _compute(self, x: torch.Tensor, state: StepState) -> list[torch.Tensor]:
        if not state.active_sites & self._bits or self._pools is None:
            return self._plain(x)
        if self._pools.must_run_alone(state):
            return [layer(x) for layer in self._adapted]
        if self._fused is not None:
            ys = self._fused(x, self._pools.worn(state), state)
            self._pools.finish(ys, state)
            return ys
        sites = self._pools.sites
        if self._matmul and self._matrices and sites and self._all_adapted:
            flat = x.reshape(-1, x.shape[-1])
            ys = self._matmul.matmul_lora_group(flat, self._matrices, sites, state.adapters)
            ys = [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
            self._pools.finish(ys, state)
            return ys
        ys = self._plain(x)
        self._pools.apply(x, ys, state)
        return ys

    def _plain(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self._matmul is None or self._matrices is None:
            return [base(x) for base in self._base]
        flat = x.reshape(-1, x.shape[-1])
        ys = self._matmul.matmul_group(flat, self._matrices)
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


class FusedProducts:
    """A group's 4-bit products with the adapters' low-rank ones in the same pass."""

    __slots__ = ("_backend", "_group")

    def __init__(self, backend: FusedFourBit, group: AdaptedFourBit) -> None:
        self._backend = backend
        self._group = group

    def __call__(
        self, x: torch.Tensor, worn: Sequence[bool], state: StepState
    ) -> list[torch.Tensor]:
        """x: [..., in] -> [..., out] of each member; ``worn``: which have rows in this step."""
        flat = x.reshape(-1, x.shape[-1])
        ys = self._backend.matmul_4bit_lora_group(flat, self._group, worn, state.adapters)
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def fused_products(
    base: Sequence[Any], pools: PoolGroup | None, backend: Backend
) -> FusedProducts | None:
    """How the group's products are made in one pass, None where they are not.

    ``base``: the members' forwards without adapters. All must be 4-bit layers whose rows can be
    taken together, and the backend one that fuses; whether a step of so many tokens is worth it is
    the backend's to know.
    """
    four = [layer for layer in base if isinstance(layer, FourBitLinear)]
    if not isinstance(backend, FusedFourBit) or len(four) < len(base):
        return None
    if pools is None or pools.sites is None or len(pools.sites.sites) < len(base):
        return None
    weights = tuple(layer.weight for layer in four)
    biases = tuple(layer.bias for layer in four)
    return FusedProducts(backend, AdaptedFourBit(weights, biases, pools.sites))


class Projection(Hook):
    """The forward of one member of a group."""

    __slots__ = ("_group", "_index")

    def __init__(self, module: nn.Module, group: Projections, index: int, state: StepState) -> None:
        super().__init__(module, 0, state)
        self._group = group
        self._index = index

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        return self._group.take(x, self._index, self.state)


def install_projections(
    modules: Mapping[str, nn.Module],
    shared: SharedInputs,
    dtype: torch.dtype,
    backend: Backend,
    state: StepState,
) -> None:
    """Puts the groups in place of their members' forwards, after ``layers.install`` if at all."""
    for names in shared:
        members = [modules[name] for name in names]
        layers: list[Any] = [module.forward for module in members]
        bf16 = dtype == torch.bfloat16
        matrices = matrix_group(members, layers, backend) if bf16 else None
        group = Projections(layers, backend, matrices)
        if len(members) == 1 and matrices is None and not group.is_fused:
            continue
        for index, module in enumerate(members):
            module.forward = Projection(module, group, index, state)


def matrix_group(
    members: Sequence[nn.Module], layers: Sequence[Any], backend: Backend
) -> MatrixGroup | None:
    """What the backend multiplies in one call, None where it does not take these weights.

    ``layers``: the members' forwards, plain or adapted.
    """
    if not isinstance(backend, GroupedMatmul):
        return None
    weights: list[FourBitWeight | DenseWeight] = []
    biases: list[torch.Tensor | None] = []
    for module, layer in zip(members, layers, strict=True):
        base = layer.base if isinstance(layer, AdaptedLayer) else layer
        if isinstance(base, FourBitLinear):
            weights.append(base.weight)
            biases.append(base.bias)
        elif (
            type(module) is nn.Linear
            and module.weight.dtype == torch.bfloat16
            and module.weight.is_contiguous()
        ):
            weights.append(DenseWeight(module.weight.data))
            biases.append(module.bias.data if module.bias is not None else None)
        else:
            return None
    wanted = all(backend.takes(weight) for weight in weights)
    kinds = {type(weight) for weight in weights}
    rounded = all(bias is None or bias.dtype == torch.bfloat16 for bias in biases)
    return MatrixGroup(weights, biases) if wanted and rounded and len(kinds) == 1 else None
