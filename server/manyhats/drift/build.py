"""Puts drift detection together from the settings: embedded for one server, or through Redis."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from manyhats.config import Settings
from manyhats.drift.actions import Actor
from manyhats.drift.archive import Archive
from manyhats.drift.evaluated import EvaluationReferences
from manyhats.drift.monitor import DriftMonitor, Names, Options
from manyhats.drift.opening import open_store
from manyhats.drift.rescoring import Compare, Rescorer
from manyhats.drift.revalidation import Evaluations, Owned, Revalidation
from manyhats.drift.track import Layout
from manyhats.drift.validation import Validations
from manyhats.drift.watch import Sizes
from manyhats.drift.webhook import Webhook
from manyhats.errors import ConfigError
from manyhats.lifecycle.evaluation.run import Plan, ScoredPair
from manyhats.lifecycle.rollouts import Rollouts
from manyhats.metrics import DriftMetrics

_PARTS: Final = 8


class AllNames(Names, Owned, Protocol):
    """The names as tenants and as owners see them."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Drift detection of one server. ``rescorer`` is None where nothing is scored again,
    ``revalidation`` where nothing can be evaluated.
    """

    monitor: DriftMonitor
    validations: Validations
    references: EvaluationReferences
    rescorer: Rescorer | None
    revalidation: Revalidation | None
    close: Callable[[], None]

    def evaluated(self, plan: Plan, pairs: Sequence[ScoredPair], report: Mapping[str, Any]) -> None:
        """An evaluation has ended: its pairs are a reference, its outcome one of the series.

        Blocks; raises ManyhatsError.
        """
        self.references.take(plan, pairs)
        if self.revalidation is not None:
            ref = plan.candidate
            self.revalidation.evaluated(ref.name, plan.tenant, ref.version, report)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All of it runs while the block does; ``close`` ends the monitor's thread."""
        self.monitor.start()
        async with AsyncExitStack() as running:
            for task in (self.rescorer, self.revalidation):
                if task is not None:
                    await running.enter_async_context(task.running())
            yield


def open_drift(
    settings: Settings,
    path: Path,
    *,
    names: AllNames,
    rollouts: Rollouts,
    metrics: DriftMetrics,
    decode: Callable[[tuple[int, ...]], str],
    compare: Compare | None = None,
    longest: int = 0,
    evaluations: Evaluations | None = None,
    clock: Callable[[], float] = time.time,
) -> Drift:
    """Drift detection over the SQLite file ``path``, or where ``redis_url`` says; not started.

    ``compare`` scores at most ``longest`` tokens again. Raises ConfigError and ServiceError.
    """
    webhook = _webhook(settings, metrics)
    store = open_store(settings, path)
    replica = None if settings.redis_url is None else uuid.uuid4().hex  # others share it
    archive = Archive(store, replica, clock)
    actor = Actor(rollouts, store, metrics, webhook.send if webhook else None, clock)
    validations = Validations(store, clock)
    monitor = DriftMonitor(
        names,
        actor,
        archive,
        validations,
        metrics,
        options_of(settings),
        decode=decode,
        clock=clock,
    )
    rescorer = None
    if compare is not None and settings.drift_share:
        rescorer = Rescorer(compare, monitor.rescored, monitor.dropped, longest=longest)
        monitor.offer = rescorer.offer

    def close() -> None:
        monitor.stop()
        if webhook is not None:
            webhook.close()
        store.close()

    again = None
    if evaluations is not None:
        again = Revalidation(evaluations, names, actor, validations, clock)
    references = EvaluationReferences(archive, names, decode)
    return Drift(monitor, validations, references, rescorer, again, close)


def options_of(settings: Settings) -> Options:
    """What the settings say, in the monitor's terms."""
    live = Layout(part=max(1, settings.drift_window // _PARTS), parts=_PARTS)
    small = Layout(part=max(1, settings.drift_small_window // _PARTS), parts=_PARTS)
    sizes = Sizes(
        warm_up=settings.drift_warm_up,
        reference=settings.drift_reference,
        sampled=settings.drift_small_reference,
        live=live,
        rescored=small,
        canary=small,
    )
    return Options(
        sizes=sizes,
        share=settings.drift_share,
        canary_share=settings.drift_canary_share,
        alpha=settings.drift_alpha,
    )


def _webhook(settings: Settings, metrics: DriftMetrics) -> Webhook | None:
    if settings.drift_webhook_url is None:
        return None
    if settings.drift_webhook_secret is None:
        raise ConfigError(
            "drift_webhook_secret: a webhook's messages are signed with it; set it beside "
            "drift_webhook_url",
            param="drift_webhook_secret",
        )
    if not settings.drift_webhook_url.startswith(("http://", "https://")):
        raise ConfigError(
            "drift_webhook_url: an http:// or https:// URL", param="drift_webhook_url"
        )
    secret = settings.drift_webhook_secret.get_secret_value()
    return Webhook(settings.drift_webhook_url, secret, lambda: metrics.dropped("webhook"))
