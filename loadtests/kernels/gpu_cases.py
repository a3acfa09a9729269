"""What bench_gpu.py times besides lora_add: bottlenecks, and attention over the paged cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_timing import Call, Shape
from torch import Tensor
from torch.nn import functional

from manyhats_kernels import ACTIVATIONS, AttentionBatch
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.testing import assert_close
from manyhats_kernels.triton.lora import Site

BOTTLENECKS = (
    Shape(32, 32, 65, 4096, 4096),
    Shape(64, 64, 17, 4096, 4096),
    Shape(512, 4, 65, 4096, 4096),
)
"""The rank counts the row that carries the bottleneck's own bias."""

SEQUENCES = ((32, 512), (1, 8192))
"""Decoding sequences and the context of each."""

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 32, 8, 128, 16


@dataclass(frozen=True)
class Line:
    """One way to make one operation at one shape: its calls, and the bytes each must move."""

    shape: str
    way: str
    bytes_moved: int
    calls: Sequence[Call]


class Bottlenecks:
    """GELU bottlenecks without a gate, of one shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype, megabytes: int) -> None:
        self.shape = shape
        self.batch = shape.plan()
        self.x, self.sites = shape.sites(shape.copies(megabytes, dtype.itemsize), dtype)
        self.bias = torch.randn(shape.adapters * shape.rank, device=self.x.device)
        kind = ACTIVATIONS.index("gelu")
        self.kinds = torch.full((shape.adapters,), kind, dtype=torch.int32, device=self.x.device)

    def add(self, backend: Any, site: Site) -> None:
        """By a backend's bottleneck_add."""
        backend.bottleneck_add(
            site.y, self.x, site.a, site.b, self.bias, self.kinds, site.rows, self.batch
        )

    def loop(self, site: Site) -> None:
        """Down, GELU and up for one adapter after the other, each on its tokens."""
        for slot, begin, end in self.batch.segments:
            tokens = self.batch.order[begin:end]
            last = (slot + 1) * self.shape.rank - 1
            run = slice(last + 1 - self.shape.rank, last)
            x, bias = self.x.index_select(0, tokens), self.bias[run].to(self.x.dtype)
            hidden = functional.gelu(functional.linear(x, site.a[run], bias))
            site.y.index_add_(0, tokens, torch.addmm(site.b[last], hidden, site.b[run]))

    def bytes_moved(self) -> int:
        """As lora_add's, but for A's last row, the gate's; and the biases, in fp32."""
        worn, width = min(self.shape.tokens, self.shape.adapters), self.x.dtype.itemsize
        extra = 4 * (self.shape.rank - 1) - width * self.shape.n_in
        return self.shape.bytes_moved(width) + worn * extra


def bottleneck_lines(backend: Any, dtype: torch.dtype, megabytes: int) -> Iterator[Line]:
    """bottleneck_add at every shape, by the backend and by a loop in PyTorch."""
    for shape in BOTTLENECKS:
        case = Bottlenecks(shape, dtype, megabytes)
        first = case.sites[0]
        case.add(ReferenceBackend(), first)
        expected = first.y.clone()
        first.y.zero_()
        case.add(backend, first)
        assert_close(first.y, expected)
        first.y.zero_()
        case.loop(first)  # rounds between its products
        torch.testing.assert_close(first.y, expected, rtol=0.05, atol=0.05)
        for way, call in (("triton", partial(case.add, backend)), ("loop", case.loop)):
            calls = [partial(call, site) for site in case.sites]
            yield Line(f"bottleneck_add, {shape}", way, case.bytes_moved(), calls)


def attention_lines(backend: Any, dtype: torch.dtype, megabytes: int) -> Iterator[Line]:
    """A decode step's attention, by the backend and by PyTorch over keys in one piece."""
    for sequences, context in SEQUENCES:
        # The keys and values once; the queries and the result are small beside them.
        need = 2 * sequences * (context * KV_HEADS + HEADS) * DIM * dtype.itemsize
        copies = max(1, min(64, megabytes * 1_000_000 // need))
        calls = _attention_calls(backend, sequences, context, copies, dtype)
        name = f"attention, {sequences} x {context}, {HEADS}/{KV_HEADS} heads of {DIM}"
        for way, made in calls.items():
            yield Line(name, way, need, made)


def _attention_calls(
    backend: Any, sequences: int, context: int, copies: int, dtype: torch.dtype
) -> dict[str, list[Call]]:
    options = {"dtype": dtype, "device": "cuda"}
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(sequences * blocks).view(sequences, blocks)
    batch = AttentionBatch.build(
        [1] * sequences, [context] * sequences, tables.tolist(), BLOCK_SIZE, "cuda"
    )
    shape = backend.kv_cache_shape(sequences * blocks, BLOCK_SIZE, KV_HEADS, DIM)
    caches = [(torch.randn(shape, **options), torch.randn(shape, **options)) for _ in range(copies)]
    q = torch.randn(sequences, HEADS, DIM, **options)

    def paged(target: Any, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = target.paged_attention(
            q, k, v, batch, scale=DIM**-0.5, sliding_window=None, soft_cap=None
        )
        return result

    def whole(k: Tensor, v: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)
        return out[:, :, 0]

    def in_one_piece(cache: Tensor) -> Tensor:
        gathered = cache[tables.to(cache.device)].transpose(1, 2)
        return gathered.reshape(sequences, KV_HEADS, blocks * BLOCK_SIZE, DIM)[:, :, :context]

    pieces = [(in_one_piece(k), in_one_piece(v)) for k, v in caches]
    expected = paged(ReferenceBackend(), *caches[0])
    assert_close(paged(backend, *caches[0]), expected)
    torch.testing.assert_close(whole(*pieces[0]), expected, rtol=0.05, atol=0.01)
    return {
        "triton": [partial(paged, backend, *cache) for cache in caches],
        "sdpa, not paged": [partial(whole, *piece) for piece in pieces],
    }
