"""Time decode steps of a randomly initialised NF4 Llama of 8B's shape on a CUDA device, end to end.

    python loadtests/kernels/bench_gpu_engine.py --out loadtests/results/engine-gpu.csv

The whole engine runs, scheduler, sampler and all, with ``--requests`` greedy requests: of the base
alone, with an adapter of rank 8 on q and v each, and with one of rank 16 on all projections each.
A step is the time between two deliveries while all requests are decoding. ``bound_us`` is what a
step must read once (packed weights, scales, head, the cache's keys and values in the middle of the
answers, the adapters' rows) over the bandwidth measured in this run; ``of_base`` is the base's
median over the line's own. The weights are random, so the text means nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
import triton
from gpu_timing import bandwidth
from step_clock import Clock
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from manyhats.adapters.parts import BaseSpec, CompiledAdapter, LowRank, SiteKind, SiteParts
from manyhats.config import Kernels, Settings
from manyhats.engine.build import build_engine
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.fourbit import read_four_bits
from manyhats.engine.model.load import BaseModel, wrap_base
from manyhats.metrics import Metrics
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    Digest,
    GenerationRequest,
    SamplingParams,
    TenantId,
)
from manyhats_kernels import FourBit, Resolved

SHAPES = {
    "8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    ),
}
MIXES = {"base": (0, ()), "rank 8, q v": (8, ("q_proj", "v_proj")), "rank 16, all": (16, ("proj",))}


@dataclass(frozen=True)
class Load:
    """What is asked of the engine."""

    requests: int
    prompt: int
    answer: int


def quantized(config: LlamaConfig, device: torch.device) -> nn.Module:
    """A random model whose linear layers but the head are NF4."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            made = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=False,
                quant_type="nf4",
                device="meta",
            )
            made.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(),
                requires_grad=False,
                compress_statistics=False,
                quant_type="nf4",
            ).to(device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made.eval())
    return model


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A word a token: the engine wants one, the figures do not."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", unk_token="w0")


def adapter(spec: BaseSpec, name: str, rank: int, parts: Sequence[str]) -> CompiledAdapter:
    """Small random rows at the sites whose names hold one of ``parts``."""
    return CompiledAdapter(
        Digest(name),
        "lora",
        {
            site.name: SiteParts(
                LowRank(
                    torch.randn(rank, site.in_features).mul_(0.01).bfloat16(),
                    torch.randn(rank, site.out_features).mul_(0.01).bfloat16(),
                )
            )
            for site in spec.sites.values()
            if site.kind is SiteKind.LINEAR and any(part in site.name for part in parts)
        },
    )


def bytes_of_step(base: BaseModel, load: Load, rank: int, parts: Sequence[str]) -> int:
    """What one decode step must read once."""
    total = base.module.get_output_embeddings().weight.numel() * 2
    for module in base.module.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            total += module.weight.numel() + state.absmax.numel() * state.absmax.itemsize
    context = load.prompt + load.answer // 2
    total += load.requests * context * sum(4 * s.kv_heads * s.head_dim for _, s in base.layers)
    for site in base.spec.sites.values():
        if site.kind is SiteKind.LINEAR and any(part in site.name for part in parts):
            total += load.requests * rank * 2 * (site.in_features + site.out_features)
    return total


def steps(
    base: BaseModel, kernels: Resolved, settings: Settings, load: Load, mix: str
) -> list[float]:
    """Seconds of each decode step with all requests in it, sorted; a first round warms up."""
    rank, parts = MIXES[mix]
    adapters = [
        adapter(base.spec, f"a{i}", rank, parts) for i in range(load.requests if rank else 0)
    ]
    by_digest = {a.digest: a for a in adapters}
    clock = Clock()
    engine = build_engine(
        settings,
        base,
        kernels,
        load_adapter=by_digest.__getitem__,
        observer=Metrics(settings.metrics_adapters),
        deliver=clock.deliver,
    )
    sampling = SamplingParams(max_tokens=load.answer, seed=0, temperature=0.0, ignore_eos=True)
    engine.loop.start()
    try:
        for turn in range(2):
            clock.expect(load.requests)
            for i in range(load.requests):
                prompt = torch.randint(3, base.vocab_size, (load.prompt,)).tolist()
                ref = AdapterRef(f"a{i}", 1, adapters[i].digest) if adapters else None
                engine.loop.submit(
                    GenerationRequest(
                        f"{turn}-{i}",
                        TenantId(DEFAULT_TENANT),
                        tuple(prompt),
                        (sampling,),
                        ref,
                        time.monotonic(),
                    )
                )
            clock.wait()
    finally:
        engine.loop.stop()
    return clock.steps()


def bench(options: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """A row for each mix of adapters."""
    load = Load(options.requests, options.prompt, options.answer)
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(
            home=Path(home),
            kernels=Kernels(options.kernels),
            slots=load.requests,
            pool_rows=16 * load.requests,
            max_num_seqs=load.requests,
            max_context=min(2 * (load.prompt + load.answer), 1024),
            cuda_graphs=not options.eager,
            prefix_cache=False,
        )
        kernels = resolve_kernels(settings.kernels, device=device, home=settings.home)
        config = SHAPES[options.shape]
        model = quantized(config, device)
        if device.type == "cuda" and isinstance(kernels.backend, FourBit):
            read_four_bits(model, kernels.backend)
        base = wrap_base(
            model,
            tokenizer(config.vocab_size),
            name=options.shape,
            digest="random",
            dtype=torch.bfloat16,
            max_context=settings.max_context,
        )
        rate = bandwidth(2048, 20) if device.type == "cuda" else float("nan")
        rows: list[dict[str, object]] = []
        plain = 0.0
        for mix, (rank, parts) in MIXES.items():
            times = [1e6 * t for t in steps(base, kernels, settings, load, mix)]
            median = times[len(times) // 2]
            plain = plain or median
            rows.append(
                {
                    "mix": mix,
                    "p10_us": round(times[len(times) // 10]),
                    "median_us": round(median),
                    "p90_us": round(times[9 * len(times) // 10]),
                    "bound_us": bytes_of_step(base, load, rank, parts) / rate * 1e6,
                    "of_base": round(plain / median, 3),
                    "bandwidth_gb_s": rate / 1e9,
                }
            )
            print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--kernels", default="triton", choices=[k.value for k in Kernels])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run")
    parser.add_argument("--out", type=Path, help="write the rows as CSV")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_gpu_engine.py needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    about: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bitsandbytes": bnb.__version__,
        **{k: v for k, v in vars(options).items() if k not in ("out", "device")},
    }
    rows = [about | row for row in bench(options, device)]
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
