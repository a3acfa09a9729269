"""Norms and gated MLPs of the base in one pass each, where they do what the kernels do.

Which ones do is found by trying: a module takes the fast forward if it gives what its own gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from manyhats.engine.model.norms import norm_kind
from manyhats_kernels.dense import DenseOps

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class FusedNorm:
    """The forward of a root-mean-square norm that multiplies by its weight."""

    __slots__ = ("_backend", "_module", "eps")

    def __init__(self, module: nn.Module, eps: float, backend: DenseOps) -> None:
        self._module: Any = module
        self.eps = eps
        self._backend = backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., n] -> [..., n]."""
        flat = x.reshape(-1, x.shape[-1])
        return self._backend.rms_norm(flat, self._module.weight, self.eps).view(x.shape)


class FusedGate:
    """The forward of an MLP: down(silu(gate(x)) * up(x))."""

    __slots__ = ("_backend", "_module")

    def __init__(self, module: nn.Module, backend: DenseOps) -> None:
        self._module: Any = module
        self._backend = backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        module = self._module
        gate, up = module.gate_proj(x), module.up_proj(x)
        width = gate.shape[-1]
        y = self._backend.silu_mul(gate.reshape(-1, width), up.reshape(-1, width))
        out: torch.Tensor = module.down_proj(y.view(*x.shape[:-1], width))
        return out


@torch.inference_mode()
def fuse(model: PreTrainedModel, backend: DenseOps) -> int:
    """Puts the fast forwards in; how many modules took one. The model must be on the CPU."""
    random = torch.Generator().manual_seed(0)
    fused = 0
    for module in model.modules():
        fast = _fast(module, backend)
        if fast is None:
            continue
        weight: torch.Tensor = next(module.parameters())
        width = int(weight.numel()) if isinstance(fast, FusedNorm) else _inputs(module)
        x = torch.randn((1, 3, width), generator=random).to(model.dtype)
        own, ours = module(x).float(), fast(x).float()
        if (own - ours).abs().max() <= 8 * torch.finfo(model.dtype).eps * own.abs().max():
            module.forward = fast
            fused += 1
    return fused


def _fast(module: nn.Module, backend: DenseOps) -> FusedNorm | FusedGate | None:
    if all(hasattr(module, name) for name in _GATED):
        return FusedGate(module, backend)
    weight = getattr(module, "weight", None)
    if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter):
        kind, offset = norm_kind(module)
        if kind is not None and not kind.centered and offset == 0.0:
            return FusedNorm(module, kind.eps, backend)
    return None


def _inputs(module: Any) -> int:
    return int(module.gate_proj.in_features)
