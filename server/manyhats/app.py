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
from types import FrameType
from typing import TYPE_CHECKING, Final

import torch
from fastapi import FastAPI

from manyhats.adapters.base_weights import BaseWeights
from manyhats.adapters.derived import DerivedFile
from manyhats.adapters.files import AdapterLimits, parse_weights, read_config
from manyhats.adapters.folder import AdapterFolder
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.sources.address import AllowList
from manyhats.api import (
    admin,
    audit,
    collection,
    drift,
    evaluations,
    operations,
    rollouts,
    sharing,
    tenants,
    usage,
    vllm,
)
from manyhats.api.auth import check_exposure
from manyhats.api.factory import create_api
from manyhats.api.readiness import Readiness
from manyhats.api.state import ApiState
from manyhats.config import Settings
from manyhats.engine.build import Engine, build_engine
from manyhats.engine.device_memory import device_memory
from manyhats.engine.heap import give_back
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.load import BaseModel, load_base, quiet_libraries, resolve_device
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.engine.no_adapters import NoAdapters
from manyhats.errors import ConfigError, ManyhatsError
from manyhats.lifecycle.build import open_adapters, open_registry, retention
from manyhats.lifecycle.loading import checked, load_adapter
from manyhats.lifecycle.service import AdapterService
from manyhats.lifecycle.warm import warm
from manyhats.metrics import LabelCap, Metrics
from manyhats.scheduler.fair import EVEN, Share, SharesOf
from manyhats.services import Services, open_services
from manyhats.serving import Listener
from manyhats.telemetry import logs
from manyhats.telemetry.build import open_telemetry
from manyhats.telemetry.build import wanted as telemetry_wanted
from manyhats.telemetry.loads import LoadLog
from manyhats.tenancy.build import open_tenancy
from manyhats.tenancy.directory import TenantDirectory
from manyhats.types import DEFAULT_TENANT, Digest, TenantId

if TYPE_CHECKING:
    from manyhats.telemetry.otel import OtelTracer

logger = logging.getLogger(__name__)

_UNNAMED = Digest("")
ROUTES: Final = (
    admin,
    audit,
    collection,
    drift,
    evaluations,
    operations,
    rollouts,
    sharing,
    tenants,
    usage,
    vllm,
)
"""The modules whose routes are served beside OpenAI's and the health ones."""


@dataclass(frozen=True, slots=True)
class Application:
    """Everything of one server, built and not started."""

    settings: Settings
    engine: Engine
    adapters: AdapterService
    api: FastAPI
    readiness: Readiness
    tenants: TenantDirectory
    closing: tuple[Callable[[], None], ...]


def build(settings: Settings) -> Application:
    """Loads the base and wires the server. Raises ConfigError where a setting cannot work here."""
    check_exposure(settings)
    AllowList(settings.source_allow)  # a bad entry is told before the base is loaded
    for root in settings.adapter_root if settings.register_roots else ():
        if not root.is_dir():
            raise ConfigError(f"--adapter-root {root}: no such folder", param="adapter_root")
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
    folder.mkdir(parents=True, exist_ok=True)
    store = open_adapters(settings, base.name)
    tenancy = open_tenancy(settings, settings.registry_file(base.name))
    registry = open_registry(settings, base.name, tenancy.directory, base.spec.digest)
    weights = LoadedWeights(site_modules(base.module, base.spec))
    compile_folder = partial(_compile_folder, settings=settings, base=base, base_weights=weights)
    metrics = Metrics(settings.metrics_adapters, max_tenant_labels=settings.metrics_tenants)
    metrics.watch_device(partial(device_memory, base.device))
    loads = LoadLog(metrics) if telemetry_wanted(settings) else None
    engine = build_engine(
        settings,
        base,
        kernels,
        load_adapter=partial(load_adapter, store, compile_folder),
        observer=loads or metrics,
        shares=_shares(tenancy.directory),
    )
    parity = engine.parity
    adapters = AdapterService(
        store=store,
        registry=registry,
        compile_folder=checked(compile_folder, parity.check) if parity else compile_folder,
        residency=engine.residency or NoAdapters(),
        base_id=base.name,
        roots=settings.adapter_root,
        limits=AdapterLimits.of(settings),
        retention=retention(settings),
    )
    services = open_services(settings, folder, engine, registry, adapters, tenancy, metrics)
    tracer = None if loads is None else _tracer(settings, engine, loads)
    state = _state(settings, engine, services, metrics, tracer)
    residency = engine.residency or NoAdapters()
    hot = partial(
        warm, state.recent, folder / "hot.json", registry, residency, limit=settings.prefetch_hot
    )
    lifespan = partial(_lifespan, state=state, engine=engine, services=services, warmed=hot)
    api = create_api(state, [module.router for module in ROUTES], lifespan)
    traced = () if tracer is None else (tracer.close,)
    closing = (*traced, *services.closing, registry.close, store.close, tenancy.close)
    return Application(settings, engine, adapters, api, state.readiness, tenancy.directory, closing)


def _state(
    settings: Settings,
    engine: Engine,
    services: Services,
    metrics: Metrics,
    tracer: OtelTracer | None,
) -> ApiState:
    """What the routes use."""
    tenancy, follower = services.tenancy, services.follower
    return ApiState(
        settings=settings,
        engine=engine.client,
        adapters=services.adapters,
        metrics=metrics,
        grammar=engine.grammars,
        tenants=tenancy.directory,
        limiter=tenancy.limiter,
        usage=tenancy.usage,
        evaluations=services.evaluations,
        operations=services.operations,
        pins=services.pins,
        shadows=services.shadows,
        drift_detection=services.drift,
        store_reachable=lambda: follower.reachable,
        tracer=tracer,
    )


def _tracer(settings: Settings, engine: Engine, loads: LoadLog) -> OtelTracer:
    tracer = open_telemetry(settings, loads, LabelCap(settings.metrics_tenants).label)
    tracer.watch(engine.client.stats)
    return tracer


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
    logs.set_up(settings.log_level, settings.log_format)
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
        tenants=application.tenants,
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
    folder: AdapterFolder, *, settings: Settings, base: BaseModel, base_weights: BaseWeights
) -> CompiledAdapter:
    limits = AdapterLimits.of(settings)
    config = read_config(folder.read(CONFIG_NAME, limits.max_config_bytes), limits)
    data = folder.read(WEIGHTS_NAME, limits.max_bytes)
    # What was compiled once is known to be finite, if it is what it was: see check() below.
    weights = parse_weights(data, limits, finite=folder.accepted)
    derived = DerivedFile(folder.path, base.spec.digest, limits)
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
    folder.check()  # nothing that damaged bytes gave is kept
    derived.save()
    return compiled


@asynccontextmanager
async def _lifespan(
    _app: FastAPI,
    *,
    state: ApiState,
    engine: Engine,
    services: Services,
    warmed: Callable[[], AbstractAsyncContextManager[None]],
) -> AsyncIterator[None]:
    engine.loop.start()
    torch.set_num_threads(1)  # for every other thread; the step thread has set its own
    gc.collect()
    gc.freeze()  # what is there by now stays: no collection need look at it again
    give_back()
    try:
        async with services.running(), state.readiness.proving(engine.client), warmed():
            yield
    finally:
        # uvicorn has waited for the responses already, within the same bound.
        engine.loop.stop()
        await services.tenancy.limiter.close()


def _ended(_signal: int, _frame: FrameType | None) -> None:
    """The default action would kill the process before it has closed its files."""
