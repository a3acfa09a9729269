"""Small real adapters on disk, and the adapter service over them without an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from manyhats.adapters.files import AdapterLimits, parse_weights, read_config
from manyhats.adapters.folder import AdapterFolder
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.parts import BaseSpec, CompiledAdapter, SiteKind, SiteSpec
from manyhats.adapters.store import AdapterStore
from manyhats.lifecycle.access import Access
from manyhats.lifecycle.collector import Retention
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.service import AdapterService
from manyhats.lifecycle.store_redis import RedisRegistryStore
from manyhats.types import AdapterRef, Digest

SITE = "model.layers.0.self_attn.q_proj"
BASE_ID = "tiny-base"
MAX_BYTES = 64 << 10
LIMITS = AdapterLimits(max_rank=8, max_bytes=MAX_BYTES)
BASE = BaseSpec(digest="0" * 64, num_layers=1, sites={SITE: SiteSpec(SITE, SiteKind.LINEAR, 8, 12)})


def config_bytes(rank: int = 2) -> bytes:
    """An adapter_config.json as PEFT writes it, the fields that matter."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    return json.dumps(config).encode()


def weights_bytes(seed: int = 0, rank: int = 2, *, scale: float = 1.0) -> bytes:
    """An adapter_model.safetensors for BASE; another ``seed``, another content."""
    generator = torch.Generator().manual_seed(seed)
    prefix = f"base_model.model.{SITE}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, 8, generator=generator) * scale,
        f"{prefix}.lora_B.weight": torch.randn(12, rank, generator=generator),
    }
    return save(tensors)


def write_adapter(folder: Path, seed: int = 0, rank: int = 2) -> Path:
    """A folder as PEFT's ``save_pretrained`` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_bytes(config_bytes(rank))
    (folder / WEIGHTS_NAME).write_bytes(weights_bytes(seed, rank))
    return folder


def compile_folder(folder: AdapterFolder) -> CompiledAdapter:
    """The real importer over BASE, ranks up to 8."""
    return compile_adapter(
        read_config(folder.read(CONFIG_NAME, LIMITS.max_config_bytes), LIMITS),
        parse_weights(folder.read(WEIGHTS_NAME, LIMITS.max_bytes), LIMITS),
        BASE,
        LIMITS,
        digest=Digest(""),
        dtype=torch.float32,
    )


@dataclass
class RecordingResidency:
    """Writes down what the tiers above the disk were told."""

    prefetched: list[AdapterRef] = field(default_factory=list)
    dropped: list[AdapterRef] = field(default_factory=list)

    def prefetch(self, ref: AdapterRef) -> None:
        self.prefetched.append(ref)

    def drop(self, ref: AdapterRef) -> None:
        self.dropped.append(ref)


@dataclass
class Adapters:
    """A service and all that it stands on. ``root`` may be registered from."""

    home: Path
    root: Path
    store: AdapterStore
    registry: Registry
    residency: RecordingResidency
    service: AdapterService

    def leftovers(self) -> list[Path]:
        """What lies in the store's temporary folders beside their processes' locks."""
        found = (self.home / "store" / "tmp").glob("*/*")
        return sorted(path for path in found if path.name != "lock")


@contextmanager
def open_adapters(
    home: Path,
    *,
    max_versions: int = 100,
    access: Access | None = None,
    redis_url: str | None = None,
    retention: Retention | None = None,
    store: AdapterStore | None = None,
    registry: Registry | None = None,
) -> Iterator[Adapters]:
    """The service over ``home``; closed at the end, so that it can be opened again.

    The registry lies there too, or in the Redis at ``redis_url``; or both are given, and left open.
    """
    root = home / "allowed"
    root.mkdir(parents=True, exist_ok=True)
    closing = []
    if store is None:
        store = AdapterStore(home / "store")
        closing.append(store.close)
    if registry is None:
        kept = RedisRegistryStore(redis_url, BASE_ID) if redis_url else home / "registry.sqlite"
        registry = Registry(kept, max_versions=max_versions, clock=lambda: 1234.5, access=access)
        closing.append(registry.close)
    residency = RecordingResidency()
    try:
        service = AdapterService(
            store=store,
            registry=registry,
            compile_folder=compile_folder,
            residency=residency,
            base_id=BASE_ID,
            roots=[root],
            limits=LIMITS,
            retention=retention,
        )
        yield Adapters(home, root, store, registry, residency, service)
    finally:
        for close in closing:
            close()
