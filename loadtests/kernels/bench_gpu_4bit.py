"""Time the product with NF4 weights on a CUDA device, beside bf16's and bitsandbytes' own.

    python loadtests/kernels/bench_gpu_4bit.py --out loadtests/results/kernels-gpu-4bit.csv

Ways without adapters: this project's kernel at 4 bits (``read4``), the matrix dequantized first
(``dequantize``), what dispatch chooses of the two (``chosen``), bitsandbytes' matmul_4bit and bf16
F.linear. With adapters (each token another one's), as the engine calls them: ``unfused`` is the
product, then shrink and expand; ``fused`` is the shrink, then the product with the expand as its
epilogue; both also of q, k and v, which share a shrink. Each is first held to the product in fp32.
The bound is what must be read once, the packed weights, scales, x, y and the adapters' rows (for
bf16 its own weights), over the bandwidth measured in this run. ``beside_us`` is the median without
adapters and, added to it, the adapters' bytes over that bandwidth: what the fused form is held to.
The tokens from which ``dequantize`` wins belong in ``DEQUANTIZE_FROM`` of ``triton/quant.py``,
those up to which ``fused`` does in ``EXPAND_UP_TO``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import triton
from gpu_timing import Shape, Times, bandwidth, measure
from torch.nn import functional

from manyhats.engine.model.fourbit import weight_of
from manyhats_kernels import FourBitWeight, resolve
from manyhats_kernels.groups import AdaptedFourBit, SiteGroup, SiteWeights
from manyhats_kernels.triton import quant

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
QKV = ((4096, 4096), (1024, 4096), (1024, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RANKS = (8, 16, 64)
Product = Callable[[int], object]


@dataclass(frozen=True)
class Way:
    """One way to make a product of copy i, and the bytes that it must move; those of the adapters
    among them, 0 without any.
    """

    name: str
    product: Product
    bytes_moved: int
    rank: int = 0
    extra: int = 0


class Layers:
    """Copies of one layer, each with weights of its own, and their input."""

    def __init__(
        self, shape: tuple[int, int], x: torch.Tensor, copies: int, nested: bool, backend: Any
    ) -> None:
        n_out, n_in = shape
        self.x = x
        self.dense = [
            torch.randn(n_out, n_in, device="cuda", dtype=torch.bfloat16) * n_in**-0.5
            for _ in range(copies)
        ]
        self.packed = [
            bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
            for w in self.dense
        ]
        self.weights: list[FourBitWeight] = [weight_of(*packed) for packed in self.packed]
        self.backend = backend

    def read4(self, i: int) -> torch.Tensor:
        """At 4 bits, whatever the number of tokens."""
        tile = quant.tile_for(self.x.shape[0], self.x.dtype)
        block_k = quant.block_k_for(tile, self.x.shape[1])
        if block_k is None:
            raise ValueError(f"no step along K fits {self.x.shape[1]}")
        processors = quant.chip_of(self.x.device)[1]
        return quant.fused(self.x, self.weights[i], None, None, tile, block_k, processors)

    def ways(self) -> list[Way]:
        """The products without adapters, each held to the one in fp32."""
        made: dict[str, Callable[[int], torch.Tensor]] = {
            "read4": self.read4,
            "dequantize": lambda i: functional.linear(
                self.x, self.backend.dequantize_4bit(self.weights[i], torch.bfloat16)
            ),
            "chosen": lambda i: self.backend.matmul_4bit(self.x, self.weights[i]),
            "bitsandbytes": lambda i: bnb.matmul_4bit(
                self.x, self.packed[i][0], quant_state=self.packed[i][1]
            ),
            "bf16": lambda i: functional.linear(self.x, self.dense[i]),
        }
        for name, way in made.items():
            exact = self.x.float() @ self.dense[0].float().T if name == "bf16" else self.exact()
            check(way(0), exact)
        return [Way(name, way, self.bytes_moved(name)) for name, way in made.items()]

    def exact(self) -> torch.Tensor:
        """The product of the first copy's quantized weights, in fp32."""
        dense = self.backend.dequantize_4bit(self.weights[0], torch.bfloat16)
        return self.x.float() @ dense.float().T

    def bytes_moved(self, way: str) -> int:
        """Weights as the way stores them, scales, x and y."""
        (tokens, n_in), n_out = self.x.shape, self.dense[0].shape[0]
        activations = 2 * tokens * (n_in + n_out)
        if way == "bf16":
            return activations + 2 * n_in * n_out
        absmax = self.weights[0].absmax
        return activations + n_in * n_out // 2 + absmax.numel() * absmax.itemsize


def check(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Within what rounding the weights and the result to bf16 brings."""
    error = (actual.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    if not error < 0.01:
        raise SystemExit(f"a wrong product: relative RMS error {error.item():.3g}")


def with_adapters(group: Sequence[Layers], rank: int) -> Iterator[Way]:
    """Unfused and fused, every token with an adapter of its own at each layer of the group."""
    first = group[0]
    backend, x, copies = first.backend, first.x, len(first.dense)
    tokens, n_in = x.shape
    shapes = [Shape(tokens, tokens, rank, n_in, layers.dense[0].shape[0]) for layers in group]
    batch = shapes[0].plan()
    sites = [shape.sites(copies, torch.bfloat16)[1] for shape in shapes]
    groups = [
        AdaptedFourBit(
            tuple(layers.weights[i] for layers in group),
            (None,) * len(group),
            SiteGroup([SiteWeights(own[i].a, own[i].b, own[i].rows) for own in sites]),
        )
        for i in range(copies)
    ]

    def unfused(i: int) -> list[torch.Tensor]:
        ys = [backend.matmul_4bit(x, weight) for weight in groups[i].weights]
        backend.lora_add_group(ys, x, groups[i].sites, batch)
        return ys

    def fused(i: int) -> list[torch.Tensor]:
        made: list[torch.Tensor] = backend.matmul_4bit_lora_group(
            x, groups[i], [True] * len(group), batch
        )
        return made

    extra = sum(2 * tokens * rank * (n_in + shape.n_out) for shape in shapes)
    size = extra + sum(layers.bytes_moved("read4") for layers in group)
    for name, way in (("unfused", unfused), ("fused", fused)):
        for y, layers, own in zip(way(0), group, sites, strict=True):
            a, b = (pool.float().view(tokens, rank, -1) for pool in (own[0].a, own[0].b))
            check(y, layers.exact() + torch.einsum("tk,trk,trn->tn", x.float(), a, b))
        yield Way(name, way, size, rank, extra)


def ways_of(group: Sequence[Layers]) -> list[Way]:
    """All ways of a layer, or of several that read the same x; ``chosen`` is first."""
    if len(group) == 1:
        plain = sorted(group[0].ways(), key=lambda way: way.name != "chosen")
    else:

        def alone(i: int) -> list[torch.Tensor]:
            return [la.backend.matmul_4bit(la.x, la.weights[i]) for la in group]

        plain = [Way("chosen", alone, sum(layers.bytes_moved("chosen") for layers in group))]
    few = group[0].x.shape[0] <= quant.EXPAND_UP_TO
    return plain + [way for rank in RANKS if few for way in with_adapters(group, rank)]


def bench(options: argparse.Namespace, rate: float) -> list[dict[str, object]]:
    """The rows of every shape, number of tokens and way."""
    backend = resolve("triton", device=torch.device("cuda"), cache_dir=Path()).backend
    rows: list[dict[str, object]] = []
    for shapes in (*((shape,) for shape in SHAPES), QKV):
        outs, n_in = [n for n, _ in shapes], shapes[0][1]
        copies = max(2, options.megabytes * 2_000_000 // (sum(outs) * n_in))
        for tokens in TOKENS:
            x = torch.randn(tokens, n_in, device="cuda", dtype=torch.bfloat16)
            group = [Layers(shape, x, copies, options.nested, backend) for shape in shapes]
            plain = 0.0
            for way in ways_of(group):
                calls = [lambda way=way, i=i: way.product(i) for i in range(copies)]
                times = measure(calls, rounds=options.rounds)
                plain = plain or times.median
                about = {"out": "+".join(map(str, outs)), "in": n_in, "tokens": tokens}
                rows.append(about | columns(way, times, plain, rate))
                print("  ".join(str(value) for value in rows[-1].values()), flush=True)
            del group, way, calls
            torch.cuda.empty_cache()
    return rows


def columns(way: Way, times: Times, plain: float, rate: float) -> dict[str, object]:
    """What is told of a way; ``plain``: the median of ``chosen`` without adapters."""
    beside = plain + way.extra / rate * 1e6
    return {
        "way": way.name,
        "rank": way.rank,
        "p10_us": round(times.p10, 2),
        "median_us": round(times.median, 2),
        "p90_us": round(times.p90, 2),
        "bound_us": round(way.bytes_moved / rate * 1e6, 2),
        "over_bound": round(times.median * rate / way.bytes_moved / 1e6, 2),
        "beside_us": round(beside, 2) if way.rank else "",
        "over_beside": round(times.median / beside, 2) if way.rank else "",
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=512, help="packed weights of each line")
    parser.add_argument("--nested", action="store_true", help="double quantization")
    parser.add_argument("--out", type=Path, help="write the rows as CSV")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu_4bit.py needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    rate = bandwidth(2048, options.rounds)
    about: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bitsandbytes": bnb.__version__,
        "nested": options.nested,
        "rounds": options.rounds,
        "bandwidth_gb_s": round(rate / 1e9, 1),
    }
    with torch.inference_mode():
        rows = [about | row for row in bench(options, rate)]
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
