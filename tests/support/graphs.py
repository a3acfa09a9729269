"""Graphs of decode steps without a GPU.

A stand-in captures: it keeps the plans and masks that a computation was captured with and computes
again from the same buffers, as a graph would, whatever the running step says.
"""

from __future__ import annotations

import torch
from support.device import DEVICE
from support.engine import LocalEngine, base_of
from support.models import tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from manyhats.engine import runner
from manyhats.engine.graphs import DecodeGraphs, GraphShape
from manyhats_kernels import Resolved
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.triton.attention import TritonAttention

HARMFUL = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")


class NothingIsReadBack(TorchDispatchMode):
    """Fails where a computation needs a value of a tensor on the host, which no graph can hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert not name.startswith(HARMFUL), f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


class StandIn:
    """Captures without a GPU; ``sizes`` has the number of tokens of each replay."""

    def __init__(self, state):
        self.state, self.sizes, self.captured = state, [], 0

    def __call__(self, compute):
        state = self.state
        plans = state.attention, state.adapters
        masks = state.active_sites, state.worn_slots
        out = compute()
        self.captured += 1

        def replay():
            before = state.active_sites, state.worn_slots
            state.active_sites, state.worn_slots = masks
            with state.static(*plans):
                out.copy_(compute())
            state.active_sites, state.worn_slots = before
            self.sizes.append(out.shape[0])

        return replay, out


class StaticBackend(TritonAttention):
    """Takes static plans: attention as on a GPU, what adapters do by the reference."""

    name = "static"
    takes_static_plans = True
    lora_add = ReferenceBackend.lora_add
    lora_add_group = ReferenceBackend.lora_add_group
    bias_add = ReferenceBackend.bias_add
    scale_rows = ReferenceBackend.scale_rows
    norm_rows = ReferenceBackend.norm_rows
    bottleneck_add = ReferenceBackend.bottleneck_add


def with_graphs(engine: LocalEngine, capture=None, max_num_seqs: int = 4):
    """Gives a built engine, not started yet, graphs by the stand-in (or another ``capture``)."""
    its = engine.engine.loop._runner
    capture = capture or StandIn(its._state)
    blocks = engine.engine.client.stats().kv_blocks_total
    slots = its._pool.slots
    shape = GraphShape(max_num_seqs, max_blocks=32, block_size=16, cache_blocks=blocks, slots=slots)
    its._fast = DecodeGraphs(
        lambda *tensors: runner.forward(its._module, *tensors),
        shape,
        its._state,
        DEVICE,
        capture,
        its._pool.launches,
    )
    return capture


def engine_of(model, home, worn, monkeypatch, backend=StaticBackend, **settings) -> LocalEngine:
    """An engine over the model, which is changed, on a backend of the test's own."""
    resolved = Resolved(backend(), "static", "the test's own")
    base = base_of(model, tiny_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr("support.engine.resolve_kernels", lambda *_, **__: resolved)
        return LocalEngine(base, home, worn(base), kernels="torch", **settings)


def logits_of(engine: LocalEngine) -> list[torch.Tensor]:
    """Filled with the logits of every step from now on."""
    its, kept = engine.engine.loop._runner, []
    run = its.run

    def watched(schedule):
        out = run(schedule)
        kept.append(out.sampling.clone())
        return out

    its.run = watched
    return kept
