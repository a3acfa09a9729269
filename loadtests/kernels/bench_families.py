"""Time decode steps over many adapters of ten families against the bare base's, end to end.

    python loadtests/kernels/bench_families.py --out loadtests/results/families.csv

One engine in this process, scheduler, sampler and all, over the default base as it is served (NF4
unless ``--quantization`` says otherwise). Rounds of ``--requests`` greedy requests alternate: all
of the base, then each over an adapter of its own, the families by turns. A step is the time between
two deliveries while all requests are decoding; of each round the median is taken, of the rounds the
median. The bound is the base's step plus the bytes that the worn adapters add to it (their parts,
and the keys and values of virtual tokens) over the bandwidth at which this machine reads one large
tensor, by the same threads, in the same run. ``ratio`` is the mixed step over the bound; the
command ends with 1 where it is over ``--bar``. The adapters' values are random, so the text means
nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from step_clock import Clock

from manyhats.adapters.parts import (
    Activation,
    BaseSpec,
    Bottleneck,
    CompiledAdapter,
    LowRank,
    Prefix,
    SiteKind,
    SiteParts,
    SiteSpec,
)
from manyhats.config import Kernels, Quantization, Settings
from manyhats.engine.build import Engine, build_engine
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.kv_cache import bytes_per_token
from manyhats.engine.model.load import BaseModel, load_base, quiet_libraries
from manyhats.metrics import Metrics
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    Digest,
    GenerationRequest,
    SamplingParams,
)

VIRTUAL = 16
"""Virtual tokens of a prefix and of a soft prompt."""

Make = Callable[[SiteSpec], SiteParts | None]


def small(*shape: int, mean: float = 0.0) -> torch.Tensor:
    """Random values near ``mean``: what is computed stays in range."""
    return (torch.randn(shape) * 0.01 + mean).bfloat16()


def product(site: SiteSpec, rank: int) -> LowRank:
    """A random product of that rank."""
    return LowRank(small(rank, site.in_features), small(rank, site.out_features))


def low_rank(rank: int, *ends: str) -> Make:
    """Products at the linear layers whose names end so."""

    def make(site: SiteSpec) -> SiteParts | None:
        fits = site.kind is SiteKind.LINEAR and site.name.endswith(ends)
        return SiteParts(low_rank=product(site, rank)) if fits else None

    return make


def pruned(site: SiteSpec) -> SiteParts | None:
    """Another rank at each layer, as AdaLoRA leaves it."""
    if site.kind is not SiteKind.LINEAR or not site.name.endswith(("q_proj", "v_proj", "up_proj")):
        return None
    return SiteParts(low_rank=product(site, 1 + len(site.name) * 7 % 12))


def dora(site: SiteSpec) -> SiteParts | None:
    """Products of rank 8 on q and v, and a scale of the outputs."""
    if site.kind is not SiteKind.LINEAR or not site.name.endswith(("q_proj", "v_proj")):
        return None
    scale = small(site.out_features, mean=1)
    return SiteParts(low_rank=product(site, 8), output_scale=scale)


def ia3(site: SiteSpec) -> SiteParts | None:
    """Scales of k's and v's outputs and of the down projection's inputs."""
    if site.kind is not SiteKind.LINEAR:
        return None
    if site.name.endswith(("k_proj", "v_proj")):
        return SiteParts(output_scale=small(site.out_features, mean=1))
    if site.name.endswith("down_proj"):
        return SiteParts(input_scale=small(site.in_features, mean=1))
    return None


def ln_tuning(site: SiteSpec) -> SiteParts | None:
    """A gain of every norm."""
    fits = site.kind is SiteKind.NORM and site.norm is not None
    return SiteParts(gain=small(site.out_features, mean=1)) if fits else None


def bitfit(site: SiteSpec) -> SiteParts | None:
    """A bias of every linear layer."""
    fits = site.kind is SiteKind.LINEAR
    return SiteParts(bias=small(site.out_features)) if fits else None


def bottleneck(site: SiteSpec) -> SiteParts | None:
    """Pfeiffer's: one after each MLP, reduction factor 16."""
    if site.kind is not SiteKind.RESIDUAL or not site.name.endswith("after_mlp"):
        return None
    hidden = site.out_features
    width = hidden // 16
    net = Bottleneck(
        down=small(width, hidden),
        up=small(width, hidden),
        activation=Activation.RELU,
        down_bias=small(width),
        up_bias=small(hidden),
    )
    return SiteParts(bottlenecks=(net,))


def prefix(site: SiteSpec) -> SiteParts | None:
    """Keys and values in every layer."""
    if site.kind is not SiteKind.ATTENTION:
        return None
    shape = (VIRTUAL, site.in_features, site.out_features)
    return SiteParts(prefix=Prefix(small(*shape), small(*shape)))


def soft_prompt(site: SiteSpec) -> SiteParts | None:
    """Vectors before the prompt."""
    fits = site.kind is SiteKind.EMBEDDING
    return SiteParts(soft_prompt=small(VIRTUAL, site.out_features)) if fits else None


FAMILIES: Mapping[str, Make] = {
    "lora": low_rank(8, "q_proj", "v_proj"),
    "rslora, all projections": low_rank(16, "_proj"),
    "dora": dora,
    "adalora": pruned,
    "ia3": ia3,
    "ln-tuning": ln_tuning,
    "bitfit": bitfit,
    "bottleneck": bottleneck,
    "prefix": prefix,
    "prompt": soft_prompt,
}


def adapter(spec: BaseSpec, index: int) -> CompiledAdapter:
    """The ``index``-th adapter, the families by turns."""
    family = list(FAMILIES)[index % len(FAMILIES)]
    made = ((name, FAMILIES[family](site)) for name, site in spec.sites.items())
    sites = {name: parts for name, parts in made if parts is not None}
    if not sites:
        raise ValueError(f"this base has no site for {family}")
    virtual = VIRTUAL if family in ("prefix", "prompt") else 0
    return CompiledAdapter(Digest(f"{index:064x}"), family, sites, virtual_tokens=virtual)


def worn_bytes(base: BaseModel, adapters: Sequence[CompiledAdapter]) -> int:
    """What a step over all of them must read once, beside what the base reads."""
    per_token = bytes_per_token([shape for _, shape in base.layers], base.dtype)
    total = 0
    for worn in adapters:
        total += worn.virtual_tokens * per_token  # they lie in the cache, not in a pool
        if not worn.virtual_tokens:
            total += worn.nbytes
    return total


def bandwidth(megabytes: int, rounds: int) -> float:
    """Bytes a second at which one large tensor is read, the best of several times."""
    big, times = torch.ones(megabytes * 1_000_000 // 4), []
    for _ in range(rounds):
        begin = time.perf_counter()
        big.sum()
        times.append(time.perf_counter() - begin)
    return big.numel() * big.element_size() / min(times[1:])


def run(
    engine: Engine,
    clock: Clock,
    refs: Sequence[AdapterRef | None],
    options: argparse.Namespace,
    name: str,
) -> float:
    """The median decode step of one round, seconds."""
    random = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_tokens=options.answer, seed=0, temperature=0.0, ignore_eos=True)
    clock.expect(len(refs))
    for i, ref in enumerate(refs):
        ids = torch.randint(3, engine.base.vocab_size, (options.prompt,), generator=random)
        prompt, now = tuple(ids.tolist()), time.monotonic()
        engine.loop.submit(
            GenerationRequest(f"{name}-{i}", DEFAULT_TENANT, prompt, (sampling,), ref, now)
        )
    clock.wait()
    return statistics.median(clock.steps())


def bench(options: argparse.Namespace) -> dict[str, object]:
    """Base and mixed rounds by turns, in one engine."""
    settings = Settings(
        kernels=Kernels(options.kernels),
        quantization=Quantization(options.quantization),
        model=options.model,
        slots=options.requests,
        pool_rows=32 * options.requests,
        max_num_seqs=options.requests,
        max_context=2 * (options.prompt + options.answer + VIRTUAL),
        prefix_cache=False,
        kv_cache_mb=1024,
        threads=options.threads,
    )
    kernels = resolve_kernels(settings.kernels, device=torch.device("cpu"), home=settings.home)
    base = load_base(settings, kernels.backend)
    adapters = [adapter(base.spec, i) for i in range(options.requests)]
    by_digest = {a.digest: a for a in adapters}
    refs = [AdapterRef(f"a{i}", 1, a.digest, a.virtual_tokens) for i, a in enumerate(adapters)]
    rate = bandwidth(512, 12)
    clock = Clock()
    engine = build_engine(
        settings,
        base,
        kernels,
        load_adapter=by_digest.__getitem__,
        observer=Metrics(settings.metrics_adapters),
        deliver=clock.deliver,
    )
    engine.loop.start()
    plain, mixed = [], []
    try:
        for turn in range(options.rounds + 1):  # the first warms up and brings the adapters
            plain.append(run(engine, clock, [None] * options.requests, options, f"base {turn}"))
            mixed.append(run(engine, clock, refs, options, f"mixed {turn}"))
            print(f"round {turn}: {plain[-1] * 1e3:.2f} ms, {mixed[-1] * 1e3:.2f} ms", flush=True)
    finally:
        engine.loop.stop()
    worn = worn_bytes(base, adapters)
    base_s, mixed_s = statistics.median(plain[1:]), statistics.median(mixed[1:])
    bound = base_s + worn / rate
    return {
        "families": len(FAMILIES),
        "adapters": len(adapters),
        "base_ms": round(base_s * 1e3, 3),
        "mixed_ms": round(mixed_s * 1e3, 3),
        "worn_mb": round(worn / 1e6, 1),
        "bandwidth_gb_s": round(rate / 1e9, 1),
        "bound_ms": round(bound * 1e3, 3),
        "ratio": round(mixed_s / bound, 3),
    }


def main() -> int:
    """Measure, print, write; 1 where the ratio is over the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--quantization", default="nf4", choices=[q.value for q in Quantization])
    parser.add_argument("--kernels", default="auto", choices=[k.value for k in Kernels])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="counted ones of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bar", type=float, default=1.4)
    parser.add_argument("--out", type=Path, help="write the figures as CSV")
    options = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    about = {k: v for k, v in vars(options).items() if k not in ("out", "bar")}
    row: dict[str, object] = {"torch": torch.__version__, **about, **bench(options)}
    print("\n".join(f"{name:<16}{value}" for name, value in row.items()))
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
    return int(float(str(row["ratio"])) > options.bar)


if __name__ == "__main__":
    sys.exit(main())
