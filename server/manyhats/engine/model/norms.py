"""What kind of norm a module is, found out by trying it."""

from __future__ import annotations

from typing import Any

import torch

from manyhats.adapters.parts import NormKind

_EPS = ("eps", "variance_epsilon")


@torch.inference_mode()
def norm_kind(module: Any) -> tuple[NormKind | None, float]:
    """The kind of a module that has a weight, and what it adds to that (0 or 1).

    The kind is None where the output is that of no known one.
    """
    weight = module.weight
    eps = next((float(e) for name in _EPS if (e := getattr(module, name, None)) is not None), None)
    if eps is None or weight.ndim != 1:
        return None, 0.0
    random = torch.Generator().manual_seed(0)
    x = torch.randn((3, weight.numel()), generator=random) * 2 + 1
    x = x.to(weight.device, weight.dtype)
    y = module(x).float()
    bias = getattr(module, "bias", None)
    for centered in (False, True):
        for offset in (0.0, 1.0):
            kind = NormKind(eps, centered)
            expected = _apply(kind, x.float(), weight.float() + offset)
            if bias is not None:
                expected = expected + bias.float()
            if (expected - y).abs().max() <= _bound(weight.dtype) * y.abs().max():
                return kind, offset
    return None, 0.0


def _apply(kind: NormKind, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    if kind.centered:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + kind.eps) * gain


def _bound(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 2e-2
