"""Finds out, in the pass that probes a model, which linear layers read the very same input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

SharedInputs = list[tuple[str, ...]]
"""Names of linear layers that are called one after the other with the same tensor, in order."""


@contextmanager
def watch_inputs(model: nn.Module) -> Iterator[SharedInputs]:
    """Watches the pass that is run inside; afterwards the yielded list is filled.

    A layer whose input nobody shares is a group of one. Layers that transpose their weight
    (GPT-2's Conv1D) are left out.
    """
    calls: list[tuple[str, torch.Tensor]] = []
    handles = [
        module.register_forward_pre_hook(partial(_note, calls, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    found: SharedInputs = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    last: torch.Tensor | None = None
    for name, x in calls:
        if x is last:
            found[-1] = (*found[-1], name)
        else:
            found.append((name,))
        last = x


def _note(
    calls: list[tuple[str, torch.Tensor]], name: str, _module: nn.Module, args: tuple[Any, ...]
) -> None:
    calls.append((name, args[0]))
