"""The parts of a residual site, plainly: what adapters/parts.py says of bottlenecks and fusion,
put into a transformers layer by hooks on the block's entry and exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from manyhats.adapters.parts import Activation, Bottleneck, Fusion, SiteParts
from manyhats.engine.model.wiring import blocks_of

_FUNCTIONS: Final[Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    Activation.RELU: torch.relu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    Activation.SILU: functional.silu,
    Activation.TANH: torch.tanh,
    Activation.LEAKY_RELU: functional.leaky_relu,
    Activation.IDENTITY: torch.clone,
}


@contextmanager
def with_stream_parts(model: nn.Module, name: str, parts: SiteParts) -> Iterator[None]:
    """The model with a residual site's parts on it, until the block is left.

    Raises ValueError where the layer is not wired in a way that is known.
    """
    layer = name.rpartition(".")[0]
    blocks = blocks_of(layer, model.get_submodule(layer))
    if name not in blocks:
        raise ValueError(f"{name}: no such place is known in {layer}")
    entry, end = blocks[name]
    entered: list[torch.Tensor] = []

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        changed = stream_output(parts, entered.pop(), out)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handles = (
        entry.register_forward_pre_hook(lambda _m, args: entered.append(args[0])),
        end.register_forward_hook(leave),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_output(parts: SiteParts, stream: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What the layer is to add to ``stream`` in place of the block's ``out``."""
    if parts.fusion is not None:
        return out + _fused(parts.fusion, parts.bottlenecks, stream, out)
    for bottleneck in parts.bottlenecks:
        change = _change(bottleneck, _reads(bottleneck, stream, out))
        out = out + change if bottleneck.skip else change - stream
    return out


def _fused(
    fusion: Fusion, bottlenecks: tuple[Bottleneck, ...], stream: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    changes = torch.stack([_change(b, _reads(b, stream, out)) for b in bottlenecks], dim=-2)
    x = _reads(bottlenecks[-1], stream, out)
    query = _linear(x, fusion.query, fusion.query_bias)
    keys = _linear(changes, fusion.key, fusion.key_bias)
    scores = (keys @ query[..., None])[..., 0] / fusion.temperature
    mixed = (torch.softmax(scores, dim=-1)[..., None] * changes).sum(dim=-2)
    return mixed if fusion.value is None else _linear(mixed, fusion.value, None)


def _reads(bottleneck: Bottleneck, stream: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if bottleneck.parallel:
        return stream
    return out if bottleneck.of_output else stream + out


def _change(bottleneck: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    inner = _FUNCTIONS[bottleneck.activation](_linear(x, bottleneck.down, bottleneck.down_bias))
    change = _linear(inner, bottleneck.up.t(), bottleneck.up_bias)
    if bottleneck.gate is None:
        return change
    gate = x @ bottleneck.gate.to(x) + bottleneck.gate_bias
    return change * torch.sigmoid(gate)[..., None]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x, weight.to(x), None if bias is None else bias.to(x))
