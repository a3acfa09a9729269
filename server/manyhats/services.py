"""What works beside the requests of a server: evaluations, shadows, fetches, pins, drift detection.

Built by the composition root, once the engine and the registry are there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from manyhats.adapters.sources.address import AllowList
from manyhats.adapters.sources.fetch import Fetcher
from manyhats.api.shadows import Shadows
from manyhats.config import Settings
from manyhats.drift.build import Drift, open_drift
from manyhats.drift.opening import FILE_NAME
from manyhats.engine.build import Engine
from manyhats.engine.interface import CompareRequest, EngineClient, LaneScores
from manyhats.engine.no_adapters import NoAdapters
from manyhats.lifecycle.collecting import collecting
from manyhats.lifecycle.evaluation.service import EvaluationService
from manyhats.lifecycle.evaluation.store import EvaluationStore
from manyhats.lifecycle.following import Follower
from manyhats.lifecycle.occupancy import Occupancy
from manyhats.lifecycle.operations import Operations
from manyhats.lifecycle.pins import Pins
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.schedule import scheduled
from manyhats.lifecycle.service import AdapterService
from manyhats.lifecycle.shadows import ShadowDirectory
from manyhats.metrics import Metrics
from manyhats.tenancy.build import Tenancy
from manyhats.types import AdapterRef, Digest, KeptLogits, TenantId


@dataclass(frozen=True, slots=True)
class Services:
    """Built, and not running; ``drift`` is None where it is switched off."""

    settings: Settings
    adapters: AdapterService
    tenancy: Tenancy
    evaluations: EvaluationService
    shadows: Shadows
    operations: Operations
    pins: Pins
    follower: Follower
    occupancy: Occupancy
    drift: Drift | None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All of it runs while the block does; then what runs in the engine is given up."""
        rollouts, usage = self.adapters.rollouts, self.tenancy.usage
        with (
            self.tenancy.directory.keep_fresh(),
            self.follower.following(),
            usage.flushing(),
            self.occupancy.counting(),
        ):
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self.evaluations.close)
                stack.push_async_callback(self.shadows.close)
                await stack.enter_async_context(scheduled(rollouts, rollouts.objection))
                period_s = self.settings.gc_period_s
                await stack.enter_async_context(collecting(self.adapters.collector, period_s))
                if self.drift is not None:
                    await stack.enter_async_context(self.drift.running())
                yield

    @property
    def closing(self) -> tuple[Callable[[], None], ...]:
        """What is to be called at the very end, in order."""
        own = (self.operations.close,)
        return own if self.drift is None else (self.drift.close, *own)


def open_services(
    settings: Settings,
    folder: Path,
    engine: Engine,
    registry: Registry,
    adapters: AdapterService,
    tenancy: Tenancy,
    metrics: Metrics,
) -> Services:
    """``folder``: the base's own, where drift and half of a fetch are kept."""
    evaluations = EvaluationService(
        engine.client,
        adapters,
        EvaluationStore(registry),
        metrics.lifecycle.evaluated,
    )
    adapters.rollouts.gate = evaluations.objection
    adapters.collector.leased = partial(_leased, engine)
    adapters.collector.freed = lambda c: metrics.lifecycle.collected(len(c.versions), c.nbytes)
    pins = _pins(settings, registry, adapters, engine)

    def changed() -> None:
        """Somebody else has written to the registry."""
        pins.sync()
        evaluations.tell()

    return Services(
        settings=settings,
        adapters=adapters,
        tenancy=tenancy,
        evaluations=evaluations,
        shadows=Shadows(ShadowDirectory(registry), engine.client, metrics.shadow),
        operations=_operations(settings, adapters, folder / "partial"),
        pins=pins,
        follower=Follower(registry, changed),
        occupancy=_occupancy(registry, engine, tenancy, metrics),
        drift=_drift(settings, folder / FILE_NAME, engine, adapters, metrics, evaluations),
    )


def _occupancy(registry: Registry, engine: Engine, tenancy: Tenancy, metrics: Metrics) -> Occupancy:
    """Residence and bytes of adapters, told to the usage and the metrics."""

    def count(owner: str, name: str, seconds: int) -> None:
        tenancy.usage.occupied(owner, name, seconds)
        metrics.lifecycle.occupied(name, seconds)

    def resident() -> list[AdapterRef]:
        return [found.ref for found in engine.client.stats().resident]

    occupancy = Occupancy(registry, resident, count, metrics.lifecycle.sized)
    tenancy.usage.sizes = occupancy.sizes
    return occupancy


def _leased(engine: Engine) -> set[Digest]:
    """What running requests hold on the device."""
    return {found.ref.digest for found in engine.client.stats().resident if found.leases}


def _operations(settings: Settings, adapters: AdapterService, folder: Path) -> Operations:
    """Registrations from where ``source_allow`` says; ``folder`` keeps what broke off."""
    allow, bound = AllowList(settings.source_allow), settings.max_adapter_mb << 20
    fetcher = Fetcher(allow, bound, settings.hub_endpoint)
    return Operations(adapters, fetcher, folder, workers=settings.source_workers)


def _pins(settings: Settings, registry: Registry, adapters: AdapterService, engine: Engine) -> Pins:
    """The pins, those of the registry told to the device."""
    device = engine.residency or NoAdapters()
    pins = Pins(registry, adapters.entry, device, bound=settings.slots - 1)
    pins.sync()
    return pins


def _drift(
    settings: Settings,
    path: Path,
    engine: Engine,
    adapters: AdapterService,
    metrics: Metrics,
    evaluations: EvaluationService,
) -> Drift | None:
    """Drift detection, unless it is switched off."""
    if not settings.drift:
        return None
    drift = open_drift(
        settings,
        path,
        names=adapters,
        rollouts=adapters.rollouts,
        metrics=metrics.drift,
        decode=engine.client.tokenizer.decode,
        compare=partial(_compare, engine.client),
        longest=engine.client.max_compared_tokens,
        evaluations=evaluations,
    )
    evaluations.ended = drift.evaluated
    return drift


async def _compare(
    client: EngineClient,
    tenant: TenantId,
    token_ids: tuple[int, ...],
    start: int,
    adapters: tuple[AdapterRef | None, ...],
    others_from: int,
    kept: KeptLogits | None,
) -> tuple[LaneScores, ...]:
    """The engine's comparison as drift detection asks for it."""
    request = CompareRequest(tenant, token_ids, start, adapters, others_from, kept)
    return await client.compare(request)
