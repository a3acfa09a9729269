"""What stands around a module's own forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from manyhats.engine.step import StepState


class Hook:
    """A callable that takes the place of a module's forward and calls it.

    ``bit`` is the site's bit in ``StepState.active_sites``: a step in which no worn adapter does
    anything here pays for one test.
    """

    __slots__ = ("base", "bit", "state")

    def __init__(self, module: nn.Module, index: int, state: StepState) -> None:
        self.base: Any = module.forward
        self.bit = 1 << index
        self.state = state


def plain_forward(module: nn.Module) -> Any:
    """A module's own forward, from under any number of hooks."""
    forward: Any = module.forward
    while isinstance(forward, Hook):
        forward = forward.base
    return forward


def unhook(module: nn.Module) -> None:
    """Gives a module its own forward back."""
    if isinstance(vars(module).get("forward"), Hook):
        module.forward = plain_forward(module)
