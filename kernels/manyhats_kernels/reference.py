"""The plainest correct PyTorch: it defines each operation, and every backend is held to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from manyhats_kernels.backend import (
    ACTIVATIONS,
    GATED,
    SiteRows,
    check_attention,
    check_bias,
    check_bottleneck,
    check_lora,
    check_norm,
    check_run,
    check_store,
)
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.groups import SiteGroup

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leaky_relu": functional.leaky_relu,
    "identity": torch.clone,
}


def gated(z: Tensor, kind: int) -> Tensor:
    """``v`` of :meth:`Backend.bottleneck_add`. ``z``: fp32 [..., rows] -> [..., rows]."""
    last = z[..., -1:]
    gate = torch.sigmoid(last) if kind & GATED else torch.ones_like(last)
    act = _FUNCTIONS[ACTIVATIONS[kind & ~GATED]]
    return torch.cat([gate * act(z[..., :-1]), gate], -1)


class ReferenceBackend:
    """Token by token, head by head, in fp32; see :class:`manyhats_kernels.backend.Backend`."""

    name = "reference"

    def lora_add(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: SiteRows, batch: AdapterBatch
    ) -> None:
        """See :meth:`Backend.lora_add`: one token at a time."""
        check_lora(y, x, a, b, rows, batch)
        for token, slot in enumerate(batch.slots.tolist()):
            if slot < 0:
                continue
            start, count = int(rows.start[slot]), int(rows.count[slot])
            check_run(slot, start, count, a.shape[0])
            if count:
                shrunk = a[start : start + count].float() @ x[token].float()
                d = shrunk @ b[start : start + count].float()
                y[token] = (y[token].float() + d).to(y.dtype)

    def lora_add_group(
        self, ys: Sequence[Tensor], x: Tensor, group: SiteGroup, batch: AdapterBatch
    ) -> None:
        """See :meth:`Backend.lora_add_group`: one site after the other."""
        group.check(ys, x, batch.num_tokens, batch.num_slots)
        for y, site in zip(ys, group.sites, strict=True):
            self.lora_add(y, x, site.a, site.b, site.rows, batch)

    def bias_add(self, y: Tensor, bias: Tensor, batch: AdapterBatch) -> None:
        """See :meth:`Backend.bias_add`: one token at a time."""
        check_bias(y, bias, batch)
        for token, slot in enumerate(batch.slots.tolist()):
            if slot >= 0:
                y[token] = (y[token].float() + bias[slot].float()).to(y.dtype)

    def scale_rows(self, y: Tensor, scale: Tensor, batch: AdapterBatch) -> None:
        """See :meth:`Backend.scale_rows`: one token at a time."""
        check_bias(y, scale, batch, "scale")
        for token, slot in enumerate(batch.slots.tolist()):
            if slot >= 0:
                y[token] = (y[token].float() * scale[slot].float()).to(y.dtype)

    def norm_rows(
        self,
        y: Tensor,
        x: Tensor,
        gain: Tensor,
        has: Tensor,
        shift: Tensor | None,
        batch: AdapterBatch,
        *,
        eps: float,
        centered: bool,
    ) -> None:
        """See :meth:`Backend.norm_rows`: one token at a time."""
        check_norm(y, x, gain, has, shift, batch)
        for token, slot in enumerate(batch.slots.tolist()):
            if slot < 0 or not has[slot]:
                continue
            d = x[token].float()
            if centered:
                d = d - d.mean()
            d = d / torch.sqrt(d.square().mean() + eps) * gain[slot].float()
            y[token] = (d if shift is None else d + shift.float()).to(y.dtype)

    def bottleneck_add(
        self,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor,
        kinds: Tensor,
        rows: SiteRows,
        batch: AdapterBatch,
    ) -> None:
        """See :meth:`Backend.bottleneck_add`: one token at a time."""
        check_lora(y, x, down, up, rows, batch)
        check_bottleneck(down, down_bias, kinds, batch)
        for token, slot in enumerate(batch.slots.tolist()):
            if slot < 0:
                continue
            start, count = int(rows.start[slot]), int(rows.count[slot])
            check_run(slot, start, count, down.shape[0])
            if count:
                own = slice(start, start + count)
                v = gated(down[own].float() @ x[token].float() + down_bias[own], int(kinds[slot]))
                y[token] = (y[token].float() + v @ up[own].float()).to(y.dtype)

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """``[num_blocks, kv_heads, block_size, head_dim]``."""
        return (num_blocks, kv_heads, block_size, head_dim)

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
    ) -> None:
        """See :meth:`Backend.store_kv`: one token at a time."""
        check_store(k, v, k_cache, v_cache, batch)
        for token, place in enumerate(batch.slot_mapping.tolist()):
            block, offset = divmod(place, batch.block_size)
            k_cache[block, :, offset] = k[token]
            v_cache[block, :, offset] = v[token]

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """See :meth:`Backend.paged_attention`: one query and one head at a time."""
        check_attention(q, k_cache, v_cache, batch, sliding_window, soft_cap)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        group = q.shape[1] // k_cache.shape[1]
        for sequence, context in enumerate(batch.host_context_lens):
            blocks = batch.block_tables[sequence].tolist()
            begin, end = batch.host_query_start[sequence : sequence + 2]
            for token in range(begin, end):
                position = context - (end - token)
                first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                places = [divmod(j, batch.block_size) for j in range(first, position + 1)]
                for head in range(q.shape[1]):
                    keys, values = (
                        torch.stack([c[blocks[i], head // group, o].float() for i, o in places])
                        for c in (k_cache, v_cache)
                    )
                    scores = (keys @ q[token, head].float()) * scale
                    if soft_cap is not None:
                        scores = soft_cap * torch.tanh(scores / soft_cap)
                    out[token, head] = (torch.softmax(scores, 0) @ values).to(q.dtype)
        return out
