"""Time the adapters' operations on a CUDA device against the bytes that they must move.

    python loadtests/kernels/bench_gpu.py --out loadtests/results/kernels-gpu.csv

Every line is one operation at one shape. lora_add is made in four ways: by the Triton kernels, by a
loop over the adapters in PyTorch, by gathering each token's rows and bmm, and three sites in one
group; bottleneck_add by the kernels and by the loop; attention by the kernels and by PyTorch's own
over keys that lie in one piece. Each way's result is first held to the reference. Rows carry the
device, the versions, quantiles over the rounds, the bound (bytes over the bandwidth measured in
this run) and how far off the median is.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_cases import Line, attention_lines, bottleneck_lines
from gpu_timing import Call, Shape, bandwidth, measure

from manyhats_kernels import AdapterBatch, resolve
from manyhats_kernels.groups import SiteGroup, SiteWeights
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.testing import assert_close
from manyhats_kernels.triton.lora import Site

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = (
    Shape(1, 1, 16, 4096, 4096),
    Shape(32, 32, 8, 4096, 4096),
    Shape(32, 32, 16, 4096, 14336),
    Shape(64, 64, 16, 4096, 4096),
    Shape(64, 64, 64, 4096, 4096),
    Shape(64, 1, 16, 4096, 4096),
    Shape(512, 4, 16, 4096, 4096),
    Shape(2048, 1, 16, 4096, 14336),
)


def loop(x: torch.Tensor, site: Site, shape: Shape, batch: AdapterBatch) -> None:
    """A pair of products an adapter, on its tokens."""
    for slot, begin, end in batch.segments:
        tokens = batch.order[begin:end]
        run = slice(slot * shape.rank, (slot + 1) * shape.rank)
        d = (x.index_select(0, tokens) @ site.a[run].T) @ site.b[run]
        site.y.index_add_(0, tokens, d)


def gather(x: torch.Tensor, site: Site, shape: Shape, batch: AdapterBatch) -> None:
    """Each token's own copy of its rows, then batched products."""
    a = site.a.view(shape.adapters, shape.rank, -1).index_select(0, batch.slots)
    b = site.b.view(shape.adapters, shape.rank, -1).index_select(0, batch.slots)
    site.y.add_(torch.bmm(torch.bmm(x[:, None], a.transpose(1, 2)), b)[:, 0])


def ways(backend: Any, shape: Shape, batch: AdapterBatch) -> dict[str, Callable[..., None]]:
    """How a site is served, by name; gathering copies rows for each token: only for few."""

    def grouped(x: torch.Tensor, site: Site) -> None:
        backend.lora_add(site.y, x, site.a, site.b, site.rows, batch)

    made: dict[str, Callable[..., None]] = {
        "triton": grouped,
        "loop": lambda x, site: loop(x, site, shape, batch),
    }
    if shape.tokens <= 64:
        made["gather"] = lambda x, site: gather(x, site, shape, batch)
    return made


def calls_by_way(
    backend: Any, shape: Shape, dtype: torch.dtype, megabytes: int
) -> dict[str, list[Call]]:
    """A call a site for each way, checked; and groups of three sites."""
    batch = shape.plan()
    x, sites = shape.sites(max(3, shape.copies(megabytes, dtype.itemsize)), dtype)
    expected = torch.zeros_like(sites[0].y)
    first = sites[0]
    ReferenceBackend().lora_add(expected, x, first.a, first.b, first.rows, batch)
    made = {}
    for name, way in ways(backend, shape, batch).items():
        first.y.zero_()
        way(x, first)
        if name == "triton":
            assert_close(first.y, expected)
        else:  # rounds between its products
            torch.testing.assert_close(first.y, expected, rtol=0.05, atol=0.05)
        made[name] = [lambda way=way, site=site: way(x, site) for site in sites]
    threes = [sites[i : i + 3] for i in range(0, len(sites) - 2, 3)]
    groups = [
        ([s.y for s in three], SiteGroup([SiteWeights(s.a, s.b, s.rows) for s in three]))
        for three in threes
    ]
    made["triton, 3 sites"] = [
        lambda ys=ys, group=group: backend.lora_add_group(ys, x, group, batch)
        for ys, group in groups
    ]
    return made


def lora_lines(backend: Any, dtype: torch.dtype, megabytes: int) -> Iterator[Line]:
    """lora_add at every shape, in every way."""
    for shape in SHAPES:
        for way, calls in calls_by_way(backend, shape, dtype, megabytes).items():
            sites = 3 if way.endswith("3 sites") else 1
            yield Line(f"lora_add, {shape}", way, shape.bytes_moved(dtype.itemsize, sites), calls)


def timed(line: Line, rate: float, rounds: int) -> dict[str, object]:
    """The columns of a line, measured."""
    bound = line.bytes_moved / rate * 1e6
    times = measure(line.calls, rounds=rounds)
    return {
        "shape": line.shape,
        "way": line.way,
        "p10_us": round(times.p10, 2),
        "median_us": round(times.median, 2),
        "p90_us": round(times.p90, 2),
        "bound_us": round(bound, 2),
        "over_bound": round(times.median / bound, 2),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=512, help="working set of each line")
    parser.add_argument("--out", type=Path, help="write the rows as CSV")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu.py needs a CUDA device", file=sys.stderr)
        return 1
    dtype = DTYPES[options.dtype]
    torch.manual_seed(0)
    backend = resolve("triton", device=torch.device("cuda"), cache_dir=Path()).backend
    rate = bandwidth(max(2048, options.megabytes), options.rounds)
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "bandwidth_gb_s": round(rate / 1e9, 1),
    }
    rows = []
    for lines in (lora_lines, bottleneck_lines, attention_lines):
        for line in lines(backend, dtype, options.megabytes):
            result = timed(line, rate, options.rounds)
            print("  ".join(f"{value}" for value in result.values()), flush=True)
            rows.append(about | result)
        torch.cuda.empty_cache()
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
