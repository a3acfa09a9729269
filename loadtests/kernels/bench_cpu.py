"""Time the CPU kernels against the bytes that they must move.

Every shape cycles through enough separate pools or caches to be out of the processor's own caches
(``--megabytes``), as the layers of a model are in a decode step. Times are the best and the median
of several rounds, in microseconds a call; GB/s counts the bytes that a call must read once. The
first line is what this machine reads at best, by the same measure.

    python loadtests/kernels/bench_cpu.py [--backend native] [--dtype bf16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from manyhats_kernels import AdapterBatch, AttentionBatch, Backend, SiteRows, resolve
from manyhats_kernels.groups import SiteGroup, SiteWeights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(calls: Sequence[Callable[[], object]], rounds: int) -> tuple[float, float]:
    """Best and median seconds of one call, over ``rounds`` passes through all ``calls``."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) / len(calls))
    return min(times[1:]), statistics.median(times[1:])


def report(what: str, byte_count: int, times: tuple[float, float]) -> None:
    """One line of the table."""
    best, median = times
    rate = f"{byte_count / best / 1e9:8.1f}" if byte_count else " " * 8
    print(f"{what:<58}{best * 1e6:10.1f}{median * 1e6:10.1f}{rate}", flush=True)


def lora_calls(
    backend: Backend, shape: tuple[int, int, int], slots: list[int], copies: int, dtype: torch.dtype
) -> list[Callable[[], object]]:
    """Calls as the engine makes them, of one site with ``(rank, in, out)`` adapters, each on pools
    of its own.
    """
    rank, n_in, n_out = shape
    count = max(slots) + 1 if slots else 1
    batch = AdapterBatch.build(slots, count)
    rows = SiteRows(
        torch.arange(count, dtype=torch.int32) * rank, torch.full((count,), rank, dtype=torch.int32)
    )
    x, y = torch.randn(len(slots), n_in).to(dtype), torch.zeros(len(slots), n_out, dtype=dtype)
    sites = [
        SiteWeights(
            torch.randn(count * rank, n_in).to(dtype),
            torch.randn(count * rank, n_out).to(dtype),
            rows,
        )
        for _ in range(copies)
    ]
    groups = [SiteGroup([site]) for site in sites]
    return [lambda group=group: backend.lora_add_group([y], x, group, batch) for group in groups]


def attention_calls(
    backend: Backend,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    copies: int,
    dtype: torch.dtype,
) -> list[Callable[[], object]]:
    """Calls of paged_attention over (new tokens, context) lengths, each on its own caches."""
    n_heads, kv_heads, dim = heads
    size = 16
    per = [-(-context // size) for _, context in lengths]
    ids = torch.randperm(sum(per)).tolist()
    tables = [ids[sum(per[:i]) : sum(per[: i + 1])] for i in range(len(per))]
    batch = AttentionBatch.build([n for n, _ in lengths], [c for _, c in lengths], tables, size)
    shape = backend.kv_cache_shape(sum(per), size, kv_heads, dim)
    caches = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(copies)]
    q = torch.randn(batch.num_tokens, n_heads, dim).to(dtype)
    return [
        lambda k=k, v=v: backend.paged_attention(
            q, k, v, batch, scale=dim**-0.5, sliding_window=None, soft_cap=None
        )
        for k, v in caches
    ]


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=256, help="working set of each line")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "manyhats")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    resolved = resolve(options.backend, device=torch.device("cpu"), cache_dir=options.cache_dir)
    backend, width, budget = resolved.backend, dtype.itemsize, options.megabytes * 1_000_000
    print(
        f"backend {backend.name} ({resolved.reason}), {options.dtype}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':<58}{'best us':>10}{'median us':>10}{'GB/s':>8}")
    big = torch.ones(budget // 4)
    report("read of one large tensor", budget, measure([big.sum], options.rounds))
    del big
    report(
        "call overhead: lora_add, 1 token, rank 1, 16 -> 16",
        0,
        measure(lora_calls(backend, (1, 16, 16), [0], 1, dtype) * 1000, options.rounds),
    )
    report(
        "call overhead: lora_add, 32 base tokens",
        0,
        measure(lora_calls(backend, (1, 16, 16), [-1] * 32, 1, dtype) * 1000, options.rounds),
    )
    for name, slots in (
        ("32 tokens over 32", list(range(32))),
        ("32 tokens over 1", [0] * 32),
        ("1 token over 1", [0]),
        ("128 tokens over 1", [0] * 128),
        ("512 tokens over 4", [i % 4 for i in range(512)]),
    ):
        for shape in ((16, 576, 960), (16, 576, 1536), (16, 1536, 576)):
            need = (max(slots) + 1) * shape[0] * (shape[1] + shape[2]) * width
            calls = lora_calls(backend, shape, slots, min(200, max(1, budget // need)), dtype)
            report(
                f"lora_add {name}, rank {shape[0]}, {shape[1]} -> {shape[2]}",
                need,
                measure(calls, options.rounds),
            )
    for name, lengths in (
        ("decode, 32 x 192", [(1, 192)] * 32),
        ("decode, 1 x 192", [(1, 192)]),
        ("decode, 1 x 4096", [(1, 4096)]),
        ("prefill, 4 x 128", [(128, 128)] * 4),
        ("prefill, 1 x 512", [(512, 512)]),
        ("chunk, 128 of 512", [(128, 512)]),
    ):
        need = sum(c for _, c in lengths) * 3 * 64 * 2 * width
        calls = attention_calls(
            backend, lengths, (9, 3, 64), min(100, max(1, budget // need)), dtype
        )
        report(f"attention {name}, 9/3 heads of 64", need, measure(calls, options.rounds))


if __name__ == "__main__":
    main()
