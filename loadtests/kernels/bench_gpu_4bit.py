"""Time the product with NF4 weights on a CUDA device, beside bf16's and bitsandbytes' own.

    python loadtests/kernels/bench_gpu_4bit.py --out loadtests/results/kernels-gpu-4bit.csv

Ways without adapters: this project's kernel at 4 bits (``read4``), the matrix dequantized first
(``dequantize``), what dispatch chooses of the two (``chosen``), bitsandbytes' matmul_4bit and bf16
F.linear. With adapters (each token another one's): ``unfused`` is the product, then shrink and
expand; ``fused`` is the shrink, then the product with the expand as its epilogue. Each is first
held to the product in fp32. The bound is what must be read once, the packed weights, scales, x, y
and the adapters' rows (for bf16 its own weights), over the bandwidth measured in this run. The
tokens from which ``dequantize`` wins belong in ``DEQUANTIZE_FROM`` of ``triton/quant.py``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
import triton
from gpu_timing import Shape, bandwidth, measure
from torch.nn import functional

from manyhats.engine.model.fourbit import weight_of
from manyhats_kernels import Expand, FourBitWeight
from manyhats_kernels.triton import quant
from manyhats_kernels.triton.lora import Launcher, Site, launch_shrink
from manyhats_kernels.triton.plan import token_tiles
from manyhats_kernels.triton.quant import TritonFourBit
from manyhats_kernels.triton.tiles import TileTable

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RANKS = (8, 16, 64)
Product = Callable[[int], torch.Tensor]


class Layers:
    """Copies of one layer, each with weights of its own, and an input."""

    def __init__(self, shape: tuple[int, int], tokens: int, copies: int, nested: bool) -> None:
        n_out, n_in = shape
        self.x = torch.randn(tokens, n_in, device="cuda", dtype=torch.bfloat16)
        self.dense = [
            torch.randn(n_out, n_in, device="cuda", dtype=torch.bfloat16) * n_in**-0.5
            for _ in range(copies)
        ]
        self.packed = [
            bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
            for w in self.dense
        ]
        self.weights: list[FourBitWeight] = [weight_of(*packed) for packed in self.packed]
        self.backend = TritonFourBit()

    def read4(self, i: int, expand: Expand | None = None) -> torch.Tensor:
        """At 4 bits, whatever the number of tokens."""
        tile = quant.tile_for(self.x.shape[0], self.x.dtype)
        block_k = quant.block_k_for(tile, self.x.shape[1])
        if block_k is None:
            raise ValueError(f"no step along K fits {self.x.shape[1]}")
        processors = quant.chip_of(self.x.device)[1]
        return quant.fused(self.x, self.weights[i], None, expand, tile, block_k, processors)

    def ways(self) -> dict[str, Product]:
        """The products by name, each of copy i."""
        return {
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


def with_adapters(layers: Layers, rank: int) -> tuple[dict[str, Product], int]:
    """Unfused and fused, every token with an adapter of its own, and the adapters' bytes."""
    tokens, n_in = layers.x.shape
    shape = Shape(tokens, tokens, rank, n_in, layers.dense[0].shape[0])
    batch, (_, sites) = shape.plan(), shape.sites(len(layers.dense), torch.bfloat16)
    tiles = token_tiles(batch)
    launcher = Launcher(TileTable.load(), quant.chip_of(layers.x.device)[0])
    tile = launcher.table.pick(launcher.chip, "shrink", tiles.tokens, 16, n_in)
    mid = torch.empty(1, tile.split, tokens, rank, dtype=torch.float32, device="cuda")

    def unfused(i: int) -> torch.Tensor:
        y = layers.read4(i)
        site = Site(y, sites[i].a, sites[i].b, sites[i].rows)
        launcher.add([site], layers.x, tiles, max_rows=rank)
        return y

    def fused(i: int) -> torch.Tensor:
        # tokens are in the order of their slots here, so places are tokens
        launch_shrink(mid, [sites[i]], layers.x, tiles, tile)
        return layers.read4(i, Expand(mid[0], sites[i].b, sites[i].rows, batch))

    dense = layers.backend.dequantize_4bit(layers.weights[0], torch.bfloat16).float()
    exact = layers.x.float() @ dense.T
    a, b = (pool.float().view(tokens, rank, -1) for pool in (sites[0].a, sites[0].b))
    exact += torch.einsum("tk,trk,trn->tn", layers.x.float(), a, b)
    for way in (unfused, fused):
        check(way(0), exact)
    return {"unfused": unfused, "fused": fused}, 2 * tokens * rank * (n_in + shape.n_out)


def bench(options: argparse.Namespace, rate: float) -> list[dict[str, object]]:
    """The rows of every shape, number of tokens and way."""
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        copies = max(2, options.megabytes * 2_000_000 // (shape[0] * shape[1]))
        for tokens in TOKENS:
            layers = Layers(shape, tokens, copies, options.nested)
            ways = [(name, way, 0, layers.bytes_moved(name)) for name, way in layers.ways().items()]
            dense = layers.backend.dequantize_4bit(layers.weights[0], torch.bfloat16).float()
            for _, way, _, _ in ways[:-1]:
                check(way(0), layers.x.float() @ dense.T)
            for rank in RANKS if tokens <= 64 else ():
                made, extra = with_adapters(layers, rank)
                ways += [
                    (name, way, rank, layers.bytes_moved(name) + extra)
                    for name, way in made.items()
                ]
            for name, way, rank, size in ways:
                times = measure(
                    [lambda way=way, i=i: way(i) for i in range(copies)], rounds=options.rounds
                )
                row: dict[str, object] = {
                    "out": shape[0],
                    "in": shape[1],
                    "tokens": tokens,
                    "way": name,
                    "rank": rank,
                    "p10_us": round(times.p10, 2),
                    "median_us": round(times.median, 2),
                    "p90_us": round(times.p90, 2),
                    "bound_us": round(size / rate * 1e6, 2),
                    "over_bound": round(times.median * rate / size / 1e6, 2),
                }
                print("  ".join(str(value) for value in row.values()), flush=True)
                rows.append(row)
            del layers, ways
            torch.cuda.empty_cache()
    return rows


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
