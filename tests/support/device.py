"""Where the Triton kernels of the tests run: on the GPU, or in the interpreter without one."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE.type == "cuda" else ())
"""The interpreter multiplies bf16 as if it were integers."""

T = TypeVar("T")


def on_device(value: T) -> T:
    """A copy of a plan, a weight or a tensor whose tensors lie on :data:`DEVICE`."""
    if DEVICE.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved: dict[str, Any] = {
            f.name: on_device(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
        return type(value)(**moved)
    return value
