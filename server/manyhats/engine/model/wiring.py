"""Finds out, in the pass that probes a model's attention, where its blocks add to the stream.

transformers' decoder layers are not rewritten: a residual site needs the norm whose input is the
stream and the module whose output is added to it. Which ones they are is guessed from the names in
the layer and then checked in numbers; a layer that is wired in another way has no residual sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from manyhats.engine.parts.norm import AXIS_ATTRIBUTE

PLACES = ("after_attention", "after_mlp")

_KNOWN = (
    # Gemma 2 and 3: what is added is the output of a norm behind the block.
    (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    # Llama, Mistral, Qwen, Phi-3 and many more.
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    # GPT-2.
    ("ln_1", "attn", "ln_2", "mlp"),
)
"""Names within a layer: entry and exit of the first block, entry and exit of the second."""

Blocks = Mapping[str, tuple[nn.Module, nn.Module]]
"""By residual site: the norm at the block's entry, the module whose output is added."""


@dataclass(slots=True)
class _Layer:
    """A layer's guess and what was seen: the stream at both entries, both outputs, the end."""

    name: str
    modules: tuple[nn.Module, ...]
    seen: dict[int, torch.Tensor] = field(default_factory=dict)
    end: torch.Tensor | None = None

    @property
    def blocks(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """By residual site."""
        first, attention, second, mlp = self.modules
        pairs = ((first, attention), (second, mlp))
        return {f"{self.name}.{place}": pair for place, pair in zip(PLACES, pairs, strict=True)}

    def holds(self) -> bool:
        """Whether the numbers bear the guess out."""
        if len(self.seen) < len(self.modules) or self.end is None:
            return False
        first, attention, second, mlp = (self.seen[i].float() for i in range(4))
        return _alike(first + attention, second) and _alike(second + mlp, self.end.float())


@contextmanager
def watch(model: nn.Module, layers: Sequence[str], tokens: int) -> Iterator[dict[str, Any]]:
    """Watches the pass that is run inside; afterwards the yielded dict holds the ``Blocks``.

    ``layers`` are the names of the model's layers. Norms that see heads are told which axis of
    their input is the tokens', of which there are ``tokens`` (a number like no number of heads).
    """
    handles = [
        module.register_forward_pre_hook(partial(_note_axis, tokens=tokens))
        for module in model.modules()
        if "Norm" in type(module).__name__
    ]
    guesses = [g for name in layers if (g := _guess(name, model.get_submodule(name))) is not None]
    for guess in guesses:
        for index, module in enumerate(guess.modules):
            if index % 2 == 0:
                handles.append(module.register_forward_pre_hook(partial(_enter, guess, index)))
            else:
                handles.append(module.register_forward_hook(partial(_leave, guess, index)))
        layer = model.get_submodule(guess.name)
        handles.append(layer.register_forward_hook(partial(_finish, guess)))
    found: dict[str, Any] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for guess in guesses:
        if guess.holds():
            found.update(guess.blocks)


def blocks_of(name: str, layer: nn.Module) -> Blocks:
    """The layer's blocks as the names in it tell, unchecked; empty where they are not known."""
    guess = _guess(name, layer)
    return {} if guess is None else guess.blocks


def _guess(name: str, layer: nn.Module) -> _Layer | None:
    children = dict(layer.named_children())
    for names in _KNOWN:
        if all(child in children for child in names):
            return _Layer(name, tuple(children[child] for child in names))
    return None


def _note_axis(module: nn.Module, args: tuple[Any, ...], *, tokens: int) -> None:
    if args and args[0].ndim == 4:
        setattr(module, AXIS_ATTRIBUTE, 1 if args[0].shape[1] == tokens else 2)


def _enter(guess: _Layer, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
    if args:
        guess.seen[index] = args[0].clone()


def _leave(guess: _Layer, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
    guess.seen[index] = _first(output).clone()


def _finish(guess: _Layer, _module: nn.Module, _args: Any, output: Any) -> None:
    guess.end = _first(output).clone()


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To a few units of 16 bits, of the largest value."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 2e-2 * b.abs().max())
