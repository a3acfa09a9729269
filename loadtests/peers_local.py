"""The libraries' own batched generation, as a peer of the server: transformers (``generate``, or
its continuous batching), and PEFT with mixed adapters.

Meant to be driven by ``run_serve_bench.py`` (a worker of its own process, so that nobody shares its
memory or its thread pool): it loads once, prints ``{"ready": true}``, and then answers each line on
stdin with one timed batch as a JSON line; a number on the line is the batch's size. Run by hand,
``--once`` does one batch and ends:

    python loadtests/peers_local.py --mode peft --model DIR --adapters DIR1 DIR2 ... --batch 32
    --once
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_stats import percentile
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Clock(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Notes when each step's logits are there; changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def load_base(path: Path, dtype: str, quantization: str, device: str) -> Any:
    """The base as the server keeps it.

    NF4 or FP4 linear weights by bitsandbytes, int8, or none quantized.
    """
    config = None
    if quantization in ("nf4", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[dtype], quantization_config=config, device_map=device
    )
    return model.eval()


def wear(model: Any, folders: Sequence[Path]) -> Any:
    """``model`` with every adapter loaded by PEFT under its folder's name."""
    from peft import PeftModel
    from tqdm import tqdm

    worn = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
    for folder in tqdm(folders[1:], desc="peft loads", unit="adapter"):
        worn.load_adapter(folder, adapter_name=folder.name)
    return worn.eval()


def random_prompts(args: argparse.Namespace, seed: int) -> list[list[int]]:
    """``args.batch`` prompts of ``args.input_tokens`` ids each."""
    rng = random.Random(seed)
    return [
        [rng.randrange(1000, args.vocab_size) for _ in range(args.input_tokens)]
        for _ in range(args.batch)
    ]


def figures(
    tokens: int, seconds: float, firsts: Sequence[float], gaps: Sequence[float]
) -> dict[str, float]:
    """What a batch is reported as: times in ms, rate in tok/s (``firsts``, ``gaps``: seconds)."""
    return {
        "output_tokens": tokens,
        "duration_s": seconds,
        "output_tok_s": tokens / seconds,
        "ttft_p50_ms": 1000 * percentile(firsts, 50),
        "ttft_p99_ms": 1000 * percentile(firsts, 99),
        "itl_p50_ms": 1000 * percentile(gaps, 50),
        "itl_p99_ms": 1000 * percentile(gaps, 99),
    }


def continuous_batch(
    model: Any, args: argparse.Namespace, seed: int, output_tokens: int
) -> dict[str, float]:
    """One greedy batch through ``generate_batch``. Raises RuntimeError where a request failed."""
    rows = random_prompts(args, seed)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=output_tokens, eos_token_id=-1, pad_token_id=0
    )
    # By itself it takes nine tenths of the machine's memory for its cache, and touches it all.
    pages = args.batch * (
        2 + (args.input_tokens + output_tokens) // ContinuousBatchingConfig.page_size
    )
    bounds = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=2048)
    started = time.perf_counter()
    out = model.generate_batch(
        inputs=rows,
        generation_config=greedy,
        continuous_batching_config=bounds,
        record_timestamps=True,
    ).values()
    seconds = time.perf_counter() - started
    tokens = [len(one.generated_tokens) for one in out]
    if tokens != [output_tokens] * args.batch:
        errors = {one.error for one in out}
        raise RuntimeError(f"continuous batching gave {tokens} tokens: {errors}")
    times = [one.timestamps or [] for one in out]
    gaps = [gap for row in times for gap in _gaps(row)]
    return figures(sum(tokens), seconds, [row[0] - started for row in times if row], gaps)


@torch.inference_mode()
def timed_batch(
    model: Any, args: argparse.Namespace, names: Sequence[str], seed: int, output_tokens: int
) -> dict[str, float]:
    """One greedy batch of ``args.batch`` random prompts of exactly the asked lengths.

    Times in ms, rate in tok/s.
    """
    ids = torch.tensor(random_prompts(args, seed), device=model.device)
    clock = _Clock()
    extra: dict[str, Any] = {}
    if names:
        extra["adapter_names"] = [names[i % len(names)] for i in range(args.batch)]
    started = time.perf_counter()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=output_tokens,
        max_new_tokens=output_tokens,
        logits_processor=LogitsProcessorList([clock]),
        **extra,
    )
    seconds = time.perf_counter() - started
    tokens = args.batch * (out.shape[1] - args.input_tokens)
    return figures(tokens, seconds, [clock.times[0] - started], _gaps(clock.times))


def _gaps(times: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--mode", choices=["transformers", "peft", "continuous"], required=True)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--adapters", type=Path, nargs="*", default=[], help="adapter folders (peft)")
    p.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    p.add_argument("--quantization", choices=["nf4", "fp4", "int8", "none"], default="nf4")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--input-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=128)
    p.add_argument("--vocab-size", type=int, default=32000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--once", action="store_true")
    args = p.parse_args(argv)
    if (args.mode == "peft") != bool(args.adapters):
        p.error("--adapters goes with --mode peft, and with it alone")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Loads, then measures a batch a line of stdin."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_base(args.model, args.dtype, args.quantization, args.device)
    names = [folder.name for folder in args.adapters]
    if names:
        model = wear(model, args.adapters)

    def batch(seed: int, output_tokens: int) -> dict[str, float]:
        if args.mode == "continuous":
            return continuous_batch(model, args, seed, output_tokens)
        return timed_batch(model, args, names, seed, output_tokens)

    # The first batch after loading pays for packing weights and for allocations.
    batch(args.seed - 1, output_tokens=4)
    if args.once:
        print(json.dumps(batch(args.seed, args.output_tokens)))
        return 0
    print(json.dumps({"ready": True}), flush=True)
    for turn, line in enumerate(sys.stdin):
        if line.strip().isdigit():
            args.batch = int(line)
        print(json.dumps(batch(args.seed + turn, args.output_tokens)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
