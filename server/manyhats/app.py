"""The composition root: builds everything from the settings. The only file that knows everybody."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from fastapi import FastAPI

from manyhats.adapters.base_weights import BaseWeights
from manyhats.adapters.derived import DerivedFile
from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.store import AdapterStore
from manyhats.api import admin, drift, rollouts, sharing, tenants, usage
from manyhats.api.auth import check_exposure
from manyhats.api.factory import create_api
from manyhats.api.readiness import Readiness
from manyhats.api.state import ApiState
from manyhats.config import Settings
from manyhats.drift.build import Drift, open_drift
from manyhats.engine.build import Engine, build_engine
from manyhats.engine.interface import CompareRequest, EngineClient, LaneScores
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.load import BaseModel, load_base, quiet_libraries, resolve_device
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.engine.no_adapters import NoAdapters
from manyhats.errors import ManyhatsError
from manyhats.lifecycle.loading import load_adapter
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.schedule import scheduled
from manyhats.lifecycle.service import AdapterService
from manyhats.lifecycle.warm import warm
from manyhats.metrics import Metrics
from manyhats.scheduler.fair import EVEN, Share, SharesOf
from manyhats.serving import Listener
from manyhats.tenancy.build import Tenancy, open_tenancy
from manyhats.tenancy.directory import TenantDirectory
from manyhats.types import DEFAULT_TENANT, AdapterRef, Digest, TenantId

logger = logging.getLogger(__name__)

_UNNAMED = Digest("")


@dataclass(frozen=True, slots=True)
class Application:
    """Everything of one server, built and not started."""

    settings: Settings
    engine: Engine
    adapters: AdapterService
    api: FastAPI
    readiness: Readiness
    closing: tuple[Callable[[], None], ...]


def build(settings: Settings) -> Application:
    """Loads the base and wires the server. Raises ConfigError where a setting cannot work here."""
    check_exposure(settings)
    settings.home.mkdir(parents=True, exist_ok=True)
    kernels = resolve_kernels(
        settings.kernels, device=resolve_device(settings.device), home=settings.home
    )
    level = logging.WARNING if kernels.fallback else logging.INFO
    logger.log(level, "kernels: %s (%s)", kernels.backend.name, kernels.reason)
    threads = settings.threads or torch.get_num_threads()
    settings = settings.model_copy(update={"threads": threads})
    base = _on_a_passing_thread(partial(load_base, settings, kernels.backend), threads)
    folder = settings.base_folder(base.name)
    store = AdapterStore(folder / "adapters")
    file = folder / "registry.sqlite"
    tenancy = open_tenancy(settings, file)
    registry = Registry(file, max_versions=settings.max_adapters, access=tenancy.directory)
    weights = LoadedWeights(site_modules(base.module, base.spec))
    compile_folder = partial(_compile_folder, settings=settings, base=base, base_weights=weights)
    metrics = Metrics(settings.metrics_adapters, max_tenant_labels=settings.metrics_tenants)
    engine = build_engine(
        settings,
        base,
        kernels,
        load_adapter=partial(load_adapter, store, compile_folder),
        observer=metrics,
        shares=_shares(tenancy.directory),
    )
    adapters = AdapterService(
        store=store,
        registry=registry,
        compile_folder=compile_folder,
        residency=engine.residency or NoAdapters(),
        base_id=base.name,
        roots=settings.adapter_root,
        limits=AdapterLimits.of(settings),
    )
    watching = _drift(settings, folder / "drift.sqlite", engine, adapters, metrics)
    state = ApiState(
        settings=settings,
        engine=engine.client,
        adapters=adapters,
        metrics=metrics,
        grammar=engine.grammars,
        tenants=tenancy.directory,
        limiter=tenancy.limiter,
        drift_detection=watching,
    )
    modules = (admin, drift, rollouts, sharing, tenants, usage)
    warmed = partial(_warm, state, folder, registry, engine)
    lifespan = partial(
        _lifespan, state=state, engine=engine, adapters=adapters, tenancy=tenancy, warmed=warmed
    )
    api = create_api(state, [module.router for module in modules], lifespan)
    ended = () if watching is None else (watching.close,)
    closing = (*ended, registry.close, store.close, tenancy.close)
    return Application(settings, engine, adapters, api, state.readiness, closing)


def _warm(
    state: ApiState, folder: Path, registry: Registry, engine: Engine
) -> AbstractAsyncContextManager[None]:
    """What was hot before is prefetched, and what is hot now is written beside the registry."""
    residency = engine.residency or NoAdapters()
    file = folder / "hot.json"
    return warm(state.recent, file, registry, residency, limit=state.settings.prefetch_hot)


def _drift(
    settings: Settings, path: Path, engine: Engine, adapters: AdapterService, metrics: Metrics
) -> Drift | None:
    """Drift detection, unless it is switched off."""
    if not settings.drift:
        return None
    return open_drift(
        settings,
        path,
        names=adapters,
        rollouts=adapters.rollouts,
        metrics=metrics.drift,
        decode=engine.client.tokenizer.decode,
        compare=partial(_compare, engine.client),
        longest=engine.client.max_compared_tokens,
    )


async def _compare(
    client: EngineClient,
    tenant: TenantId,
    token_ids: tuple[int, ...],
    start: int,
    adapters: tuple[AdapterRef | None, ...],
) -> tuple[LaneScores, ...]:
    """The engine's comparison as drift detection asks for it."""
    return await client.compare(CompareRequest(tenant, token_ids, start, adapters))


def _shares(directory: TenantDirectory) -> SharesOf:
    """Each tenant's part as it is set now; one who is gone ends on equal terms."""

    def share(ident: TenantId) -> Share:
        tenant = directory.find(ident)
        return EVEN if tenant is None else Share(tenant.weight, tenant.priority)

    return share


def _on_a_passing_thread(load: Callable[[], BaseModel], threads: int) -> BaseModel:
    """What ``load`` gives, computed by ``threads`` threads that are gone afterwards.

    OpenMP keeps a team of threads for each thread that ever asked for one, and once there are more
    of them than processors it lets them sleep at every barrier: a decode step then takes half as
    long again. So the step thread's team must be the only one (see also ``_lifespan``).
    """

    def run() -> BaseModel:
        torch.get_num_threads()  # torch sets up a thread's own count at its first use
        torch.set_num_threads(threads)
        return load()

    with ThreadPoolExecutor(1) as passing:
        base = passing.submit(run).result()
    torch.set_num_threads(1)
    return base


def serve(settings: Settings) -> None:
    """Builds the server and runs it until SIGTERM or Ctrl-C; then drains within
    ``settings.drain_s``.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    quiet_libraries()
    application = build(settings)
    if settings.register_roots:
        register_roots(application)
    # uvicorn raises the signal again once it has shut down: all is done then, and nothing failed.
    signal.signal(signal.SIGTERM, _ended)
    try:
        _listener(application).run()
    except KeyboardInterrupt:
        logger.info("interrupted; the running requests have ended")
    finally:
        for close in application.closing:
            close()


def _listener(application: Application) -> Listener:
    def names() -> list[str]:
        return sorted({card.ref.name for card in application.adapters.list(DEFAULT_TENANT)})

    return Listener(
        application.api,
        application.settings,
        engine=application.engine.client,
        readiness=application.readiness,
        close_door=application.engine.loop.close_door,
        names=names,
    )


def register_roots(application: Application) -> None:
    """Registers every adapter folder directly under the adapter roots, by the folder's name.

    One that is refused is logged with the reason; the others go on.
    """
    for root in application.settings.adapter_root:
        for folder in sorted(p for p in root.iterdir() if (p / "adapter_config.json").is_file()):
            try:
                application.adapters.register_folder(
                    folder.name, str(folder), tenant=DEFAULT_TENANT
                )
            except ManyhatsError as error:
                logger.error("%s is not registered: %s", folder, error.message)


def _compile_folder(
    folder: Path, *, settings: Settings, base: BaseModel, base_weights: BaseWeights
) -> CompiledAdapter:
    limits = AdapterLimits.of(settings)
    config = read_config_file(folder / "adapter_config.json", limits)
    weights = read_weights(folder / "adapter_model.safetensors", limits)
    derived = DerivedFile(folder, base.spec.digest, limits)
    compiled = compile_adapter(
        config,
        weights,
        base.spec,
        limits,
        digest=_UNNAMED,
        dtype=base.dtype,
        base_weights=base_weights,
        derived=derived,
    )
    derived.save()
    return compiled


@asynccontextmanager
async def _lifespan(
    _app: FastAPI,
    *,
    state: ApiState,
    engine: Engine,
    adapters: AdapterService,
    tenancy: Tenancy,
    warmed: Callable[[], AbstractAsyncContextManager[None]],
) -> AsyncIterator[None]:
    engine.loop.start()
    torch.set_num_threads(1)  # for every other thread; the step thread has set its own
    gc.collect()
    gc.freeze()  # what is there by now stays: no collection need look at it again
    try:
        with tenancy.directory.keep_fresh():
            async with (
                scheduled(adapters.rollouts),
                state.readiness.proving(engine.client),
                _watched(state.drift_detection),
                warmed(),
            ):
                yield
    finally:
        # uvicorn has waited for the responses already, within the same bound.
        engine.loop.stop()
        await tenancy.limiter.close()


@asynccontextmanager
async def _watched(watching: Drift | None) -> AsyncIterator[None]:
    """Drift detection runs while the block does."""
    if watching is None:
        yield
        return
    watching.monitor.start()
    if watching.rescorer is None:
        yield
        return
    async with watching.rescorer.running():
        yield


def _ended(_signal: int, _frame: FrameType | None) -> None:
    """The default action would kill the process before it has closed its files."""
