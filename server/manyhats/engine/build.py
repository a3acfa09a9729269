"""Puts an engine together from a base model in memory and the settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.slots import SlotTable
from manyhats.config import Settings
from manyhats.engine.client import AsyncEngine, Postbox
from manyhats.engine.grammars import Grammars
from manyhats.engine.graphs import CudaCapture, DecodeGraphs, GraphShape
from manyhats.engine.hooks import unhook
from manyhats.engine.interface import EngineObserver, EngineStats, ModelInfo
from manyhats.engine.kernels import check_rank
from manyhats.engine.kv_cache import (
    allocate,
    bytes_per_token,
    choose_num_blocks,
    idle_blocks,
    report,
)
from manyhats.engine.launches import LaunchTable
from manyhats.engine.layers import install
from manyhats.engine.loop import Deliver, EngineLoop
from manyhats.engine.mailbox import Mailbox
from manyhats.engine.model.load import BaseModel
from manyhats.engine.model.spec import site_modules
from manyhats.engine.no_adapters import NoAdapters
from manyhats.engine.parity import ParityCheck, Unregistered
from manyhats.engine.pool import AdapterPool
from manyhats.engine.postprocess import Postprocessor
from manyhats.engine.projections import install_projections
from manyhats.engine.residency import AdapterResidency
from manyhats.engine.runner import FastPath, ModelRunner, forward
from manyhats.engine.sampling import Sampler
from manyhats.engine.stack import agrees, layer_stack
from manyhats.engine.step import StepState
from manyhats.scheduler.blocks import BlockManager
from manyhats.scheduler.fair import FairShares, Prices, SharesOf, all_alike
from manyhats.scheduler.scheduler import Scheduler
from manyhats.types import Digest
from manyhats_kernels import Capturable, Resolved

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine. ``residency`` is None where it was built without adapter layers."""

    base: BaseModel
    loop: EngineLoop
    client: AsyncEngine
    residency: AdapterResidency | None
    grammars: Grammars
    kernels: Resolved
    parity: ParityCheck | None


def build_engine(
    settings: Settings,
    base: BaseModel,
    kernels: Resolved,
    *,
    load_adapter: Callable[[Digest], CompiledAdapter],
    observer: EngineObserver,
    deliver: Deliver | None = None,
    shares: SharesOf = all_alike,
) -> Engine:
    """Allocates caches and pools and wires the loop (not started yet).

    ``load_adapter`` reads a compiled adapter from the disk tier, in the base's dtype. ``deliver``
    replaces the client's own delivery (for callers without an event loop). ``shares`` gives a
    tenant's part. Raises ConfigError on sizes that cannot work.
    """
    check_rank(kernels, settings.max_rank)
    state, mailbox, postbox = StepState(), Mailbox(), Postbox()
    blocks = _allocate_cache(settings, base, kernels, state)
    pool, residency = None, None
    unregistered = Unregistered(load_adapter)
    modules = site_modules(base.module, base.spec)
    for module in modules.values():
        unhook(module)
    if settings.adapter_layers:
        pool = _install_pool(settings, base, kernels, state)
        residency = _residency(settings, pool, unregistered, mailbox, observer)
    install_projections(modules, base.shared, base.dtype, kernels.backend, state)
    scheduler = _scheduler(settings, base, blocks, residency or NoAdapters(), shares)
    grammars = Grammars(base.tokenizer.backend, base.vocab_size, base.eos_token_ids)
    runner = _runner(settings, base, kernels, pool, state, blocks.num_blocks)
    loop = EngineLoop(
        scheduler=scheduler,
        runner=runner,
        postprocessor=_postprocessor(settings, base, grammars, scheduler, observer),
        residency=residency,
        observer=observer,
        deliver=deliver or postbox.deliver,
        snapshot=_snapshot(settings, scheduler, blocks, residency),
        mailbox=mailbox,
        max_queue=settings.max_queue,
        max_background=settings.max_background,
        threads=settings.threads,
    )
    client = _client(settings, base, kernels, loop, postbox)
    parity = None
    if residency is not None and settings.parity_probe:
        parity = ParityCheck(base, loop, client, runner, blocks, residency, unregistered)
    return Engine(base, loop, client, residency, grammars, kernels, parity)


def _residency(
    settings: Settings,
    pool: AdapterPool,
    load: Unregistered,
    mailbox: Mailbox,
    observer: EngineObserver,
) -> AdapterResidency:
    return AdapterResidency(
        SlotTable(settings.slots, pool.capacity),
        pool,
        load,
        host_bytes=settings.host_cache_mb << 20,
        limits=AdapterLimits.of(settings),
        post=mailbox.post,
        observer=observer,
    )


def _client(
    settings: Settings, base: BaseModel, kernels: Resolved, loop: EngineLoop, postbox: Postbox
) -> AsyncEngine:
    return AsyncEngine(
        loop,
        postbox,
        _model_info(settings, base, kernels),
        base.tokenizer,
        max_compared_tokens=_compared_rows(settings, base),
    )


def _compared_rows(settings: Settings, base: BaseModel) -> int:
    """Rows of logits that ``compare_mb`` holds."""
    return (settings.compare_mb << 20) // (base.vocab_size * base.dtype.itemsize)


def _postprocessor(
    settings: Settings,
    base: BaseModel,
    grammars: Grammars,
    scheduler: Scheduler,
    observer: EngineObserver,
) -> Postprocessor:
    return Postprocessor(
        sampler=Sampler(base.vocab_size, base.device, base.eos_token_ids),
        tokenizer=base.tokenizer.backend,
        grammars=grammars,
        scheduler=scheduler,
        observer=observer,
        eos_token_ids=base.eos_token_ids,
        context_len=base.context_len,
        kept_rows=_compared_rows(settings, base),
    )


def _scheduler(
    settings: Settings,
    base: BaseModel,
    blocks: BlockManager,
    residency: AdapterResidency | NoAdapters,
    shares: SharesOf,
) -> Scheduler:
    return Scheduler(
        blocks,
        residency,
        max_num_seqs=settings.max_num_seqs,
        max_step_tokens=settings.max_step_tokens,
        max_queue=settings.max_queue,
        max_context=base.context_len,
        max_background=settings.max_background,
        background_tokens=settings.background_tokens,
        fair=FairShares(shares, Prices(settings.input_price, settings.output_price)),
    )


def _allocate_cache(
    settings: Settings, base: BaseModel, kernels: Resolved, state: StepState
) -> BlockManager:
    shapes = [shape for _, shape in base.layers]
    num_blocks = choose_num_blocks(
        shapes,
        base.dtype,
        base.device,
        block_size=settings.block_size,
        kv_cache_mb=settings.kv_cache_mb,
        kv_cache_blocks=settings.kv_cache_blocks,
        max_num_seqs=settings.max_num_seqs,
        context_len=base.context_len,
    )
    allocate(
        base.layers,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        dtype=base.dtype,
        device=base.device,
        backend=kernels.backend,
        state=state,
    )
    per_block = bytes_per_token(shapes, base.dtype) * settings.block_size
    report(num_blocks, settings.block_size, per_block, base.device)
    return BlockManager(
        num_blocks,
        settings.block_size,
        prefix_cache=settings.prefix_cache,
        base_digest=base.spec.digest,
        idle_blocks=idle_blocks(num_blocks, base.device),
    )


def _install_pool(
    settings: Settings, base: BaseModel, kernels: Resolved, state: StepState
) -> AdapterPool:
    sites = list(base.spec.sites.values())
    pool = AdapterPool(
        sites,
        rows=settings.rows,
        slots=settings.slots,
        override_bytes=settings.override_mb << 20,
        dtype=base.dtype,
        device=base.device,
        backend=kernels.backend,
    )
    install(site_modules(base.module, base.spec), base.blocks, pool, state)
    logger.info(
        "adapters: %d slots, %d rank rows at %d sites", settings.slots, settings.rows, len(sites)
    )
    return pool


def _runner(
    settings: Settings,
    base: BaseModel,
    kernels: Resolved,
    pool: AdapterPool | None,
    state: StepState,
    cache_blocks: int,
) -> ModelRunner:
    """With a quicker way for steps, where device, backend and settings allow one."""
    fast: FastPath | None = None
    if base.device.type == "cuda":
        fast = _graphs(settings, base, kernels, pool, state, cache_blocks)
    elif settings.layer_stack:
        stack = layer_stack(base, kernels.backend, pool, state)
        compute = partial(forward, base.module)
        if stack and agrees(stack, compute, state, cache_blocks, settings.block_size):
            logger.info(
                "%s steps take all layers in one call", "all" if stack.takes_prompts else "decode"
            )
            fast = stack
    return ModelRunner(base, pool, state, settings.block_size, fast)


def _graphs(
    settings: Settings,
    base: BaseModel,
    kernels: Resolved,
    pool: AdapterPool | None,
    state: StepState,
    cache_blocks: int,
) -> DecodeGraphs | None:
    backend = kernels.backend
    capturable = isinstance(backend, Capturable) and backend.takes_static_plans
    if not settings.cuda_graphs or not capturable:
        return None
    shape = GraphShape(
        max_num_seqs=settings.max_num_seqs,
        max_blocks=-(-base.context_len // settings.block_size),
        block_size=settings.block_size,
        cache_blocks=cache_blocks,
        slots=pool.slots if pool is not None else 0,
    )
    launches = pool.launches if pool is not None else LaunchTable(0)
    compute = partial(forward, base.module)
    return DecodeGraphs(compute, shape, state, base.device, CudaCapture(), launches)


def _snapshot(
    settings: Settings,
    scheduler: Scheduler,
    blocks: BlockManager,
    residency: AdapterResidency | None,
) -> Callable[[int, int], EngineStats]:
    def snapshot(steps: int, failed_steps: int) -> EngineStats:
        return EngineStats(
            running=scheduler.num_running - scheduler.num_background[1],
            waiting=scheduler.num_waiting,
            kv_blocks_total=blocks.num_blocks,
            kv_blocks_used=blocks.num_used,
            kv_block_size=settings.block_size,
            slots_total=settings.slots,
            rows_total=settings.rows,
            rows_used=residency.rows_used if residency else 0,
            host_bytes_used=residency.host.bytes_used if residency else 0,
            host_bytes_total=settings.host_cache_mb << 20,
            resident=residency.residents() if residency else (),
            waiting_adapters=residency.waiting_adapters() if residency else (),
            steps=steps,
            failed_steps=failed_steps,
            background_waiting=scheduler.num_background[0],
            background_running=scheduler.num_background[1],
        )

    return snapshot


def _model_info(settings: Settings, base: BaseModel, kernels: Resolved) -> ModelInfo:
    return ModelInfo(
        id=base.name,
        digest=base.spec.digest,
        created=base.created,
        context_len=base.context_len,
        vocab_size=base.vocab_size,
        eos_token_ids=base.eos_token_ids,
        quantization=settings.quantization.value,
        dtype=settings.dtype.value,
        device=str(base.device),
        kernel_backend=kernels.backend.name,
        kernel_reason=kernels.reason,
    )
