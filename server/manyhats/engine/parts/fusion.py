"""The attention of a token over what several bottlenecks give (AdapterFusion)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class PlacedFusion:
    """A ``Fusion`` on the device, over the slot's first ``count`` bottlenecks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    temperature: float
    count: int

    def __call__(self, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """x: [n, hidden], d: [n, count, hidden] -> [n, hidden]."""
        query = functional.linear(x, self.query, self.query_bias).float()
        keys = functional.linear(d, self.key, self.key_bias).float()
        scores = (keys @ query[:, :, None])[:, :, 0] / self.temperature
        mixed = (torch.softmax(scores, -1)[:, None] @ d.float())[:, 0].to(d.dtype)
        return mixed if self.value is None else functional.linear(mixed, self.value)
