"""Plain PyTorch at a fair speed: what serves where no C compiler is, and on a GPU for now."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manyhats_kernels.backend import (
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
from manyhats_kernels.reference import gated

MASKED_GEMM_MAX_SLOTS = 32
"""Above this many short segments the mask's quadratic work costs more than a loop over segments."""

LONG_SEGMENT = 48
"""Tokens from which a segment gets a pair of GEMMs of its own."""


class TorchBackend:
    """Whole-tensor PyTorch on any device; see :class:`manyhats_kernels.backend.Backend`.

    Short segments share one pair of GEMMs over the stacked rows of their adapters, a mask zeroing
    what is not a token's own in between; long ones, and many short ones, get a pair each. Products
    are made in fp32: weights and inputs are converted, so nothing is rounded before the end.
    ``lora_add`` reads the worn slots' rows back to the host.
    """

    name = "torch"

    def lora_add(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: SiteRows, batch: AdapterBatch
    ) -> None:
        """See :meth:`Backend.lora_add`."""
        check_lora(y, x, a, b, rows, batch)
        if not batch.segments:
            return
        slots = batch.segment_slots
        starts, counts = rows.start[slots].tolist(), rows.count[slots].tolist()
        short = []
        for (slot, begin, end), start, count in zip(batch.segments, starts, counts, strict=True):
            check_run(slot, start, count, a.shape[0])
            if not count:
                continue
            if end - begin >= LONG_SEGMENT:
                self._add_segment(y, x, a, b, batch.order[begin:end], (start, count))
            else:
                short.append((begin, end, start, count))
        if 1 < len(short) <= MASKED_GEMM_MAX_SLOTS:
            self._add_masked(y, x, a, b, batch.order, short)
            return
        for begin, end, start, count in short:
            self._add_segment(y, x, a, b, batch.order[begin:end], (start, count))

    def _add_segment(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, tokens: Tensor, run: tuple[int, int]
    ) -> None:
        a_own, b_own = (pool.narrow(0, *run).float() for pool in (a, b))
        d = (x.index_select(0, tokens).float() @ a_own.T) @ b_own
        y.index_copy_(0, tokens.long(), d.add_(y.index_select(0, tokens)).to(y.dtype))

    def _add_masked(
        self,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        order: Tensor,
        short: list[tuple[int, int, int, int]],
    ) -> None:
        tokens = torch.cat([order[begin:end] for begin, end, _, _ in short])
        a_all = torch.cat([a.narrow(0, start, count) for _, _, start, count in short]).float()
        b_all = torch.cat([b.narrow(0, start, count) for _, _, start, count in short]).float()
        which = torch.arange(len(short))
        of_token = which.repeat_interleave(
            torch.tensor([end - begin for begin, end, _, _ in short])
        )
        of_row = which.repeat_interleave(torch.tensor([count for _, _, _, count in short]))
        foreign = (of_token[:, None] != of_row[None, :]).to(x.device)
        shrunk = x.index_select(0, tokens).float() @ a_all.T
        d = shrunk.masked_fill_(foreign, 0.0) @ b_all
        y.index_copy_(0, tokens.long(), d.add_(y.index_select(0, tokens)).to(y.dtype))

    def lora_add_group(
        self, ys: Sequence[Tensor], x: Tensor, group: SiteGroup, batch: AdapterBatch
    ) -> None:
        """See :meth:`Backend.lora_add_group`: one site after the other."""
        group.check(ys, x, batch.num_tokens, batch.num_slots)
        for y, site in zip(ys, group.sites, strict=True):
            self.lora_add(y, x, site.a, site.b, site.rows, batch)

    def bias_add(self, y: Tensor, bias: Tensor, batch: AdapterBatch) -> None:
        """See :meth:`Backend.bias_add`."""
        check_bias(y, bias, batch)
        if batch.segments:
            order = batch.order.long()
            d = bias.index_select(0, batch.slots.index_select(0, order)).float()
            y.index_copy_(0, order, d.add_(y.index_select(0, order)).to(y.dtype))

    def scale_rows(self, y: Tensor, scale: Tensor, batch: AdapterBatch) -> None:
        """See :meth:`Backend.scale_rows`."""
        check_bias(y, scale, batch, "scale")
        if batch.segments:
            order = batch.order.long()
            d = scale.index_select(0, batch.slots.index_select(0, order)).float()
            y.index_copy_(0, order, d.mul_(y.index_select(0, order)).to(y.dtype))

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
        """See :meth:`Backend.norm_rows`."""
        check_norm(y, x, gain, has, shift, batch)
        order = batch.order.long()
        slots = batch.slots.index_select(0, order)
        mine = has.index_select(0, slots) != 0
        order, slots = order[mine], slots[mine]
        d = x.index_select(0, order).float()
        if centered:
            d = d - d.mean(-1, keepdim=True)
        d = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + eps)
        d = d * gain.index_select(0, slots).float()
        y.index_copy_(0, order, (d if shift is None else d + shift.float()).to(y.dtype))

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
        """See :meth:`Backend.bottleneck_add`: a pair of GEMMs a segment."""
        check_lora(y, x, down, up, rows, batch)
        check_bottleneck(down, down_bias, kinds, batch)
        if not batch.segments:
            return
        slots = batch.segment_slots
        runs = zip(
            batch.segments,
            rows.start[slots].tolist(),
            rows.count[slots].tolist(),
            kinds[slots].tolist(),
            strict=True,
        )
        for (slot, begin, end), start, count, kind in runs:
            check_run(slot, start, count, down.shape[0])
            if not count:
                continue
            tokens = batch.order[begin:end]
            z = x.index_select(0, tokens).float() @ down.narrow(0, start, count).float().T
            v = gated(z + down_bias.narrow(0, start, count), kind)
            d = v @ up.narrow(0, start, count).float()
            y.index_copy_(0, tokens.long(), d.add_(y.index_select(0, tokens)).to(y.dtype))

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """``[num_blocks, kv_heads, block_size, head_dim]``."""
        return (num_blocks, kv_heads, block_size, head_dim)

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
    ) -> None:
        """See :meth:`Backend.store_kv`."""
        check_store(k, v, k_cache, v_cache, batch)
        block = batch.slot_mapping // batch.block_size
        offset = batch.slot_mapping % batch.block_size
        k_cache[block, :, offset] = k
        v_cache[block, :, offset] = v

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
        """See :meth:`Backend.paged_attention`: gather and attend, one sequence at a time.

        The probabilities are rounded to q's dtype before they meet V, as PyTorch's own attention
        does on the CPU.
        """
        check_attention(q, k_cache, v_cache, batch, sliding_window, soft_cap)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for sequence in range(batch.num_sequences):
            attend_sequence(
                out, q, k_cache, v_cache, batch, sequence, scale, sliding_window, soft_cap
            )
        return out


def attend_sequence(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    sequence: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """Write the attention of one sequence's new tokens to their rows of ``out``.

    Gathers the blocks that the sequence can see into a contiguous copy; meant for prefill.
    """
    begin, end = batch.host_query_start[sequence : sequence + 2]
    context, size, queries = batch.host_context_lens[sequence], batch.block_size, end - begin
    first = 0 if sliding_window is None else max(0, context - queries - sliding_window + 1)
    first_block = first // size
    table = batch.block_tables[sequence, first_block : -(-context // size)]
    first, visible = first_block * size, context - first_block * size
    heads, kv_heads, dim = q.shape[1], k_cache.shape[1], q.shape[2]
    keys, values = (
        c.index_select(0, table).transpose(0, 1).reshape(kv_heads, -1, dim)[:, :visible]
        for c in (k_cache, v_cache)
    )
    query = q[begin:end].transpose(0, 1)
    plain = sliding_window is None or sliding_window >= context
    causal = plain and visible == queries
    mask = None
    if not causal and not (plain and queries == 1):
        at = torch.arange(context - queries, context, device=q.device)[:, None]
        seen = torch.arange(first, context, device=q.device)[None, :]
        mask = seen <= at
        if sliding_window is not None:
            mask &= at - seen < sliding_window
    if soft_cap is None:
        result = scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )[0]
    else:
        result = _soft_capped(query, keys, values, mask, causal, scale, soft_cap)
    out[begin:end] = result.transpose(0, 1)


def _soft_capped(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    soft_cap: float,
) -> Tensor:
    group = query.shape[0] // keys.shape[0]
    keys, values = (t.float().repeat_interleave(group, 0) for t in (keys, values))
    scores = (query.float() @ keys.transpose(1, 2)) * scale
    scores = torch.tanh(scores / soft_cap) * soft_cap
    if causal:
        mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, -1) @ values).to(query.dtype)
