"""What the routes stand on: one frozen object, put on the application by ``create_api``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request

from manyhats.api.readiness import Readiness
from manyhats.api.shadows import Shadows
from manyhats.config import Settings
from manyhats.drift.build import Drift
from manyhats.drift.monitor import DriftMonitor
from manyhats.engine.interface import EngineClient
from manyhats.lifecycle.directory import AdapterDirectory
from manyhats.lifecycle.evaluation.service import EvaluationService
from manyhats.lifecycle.operations import Operations
from manyhats.lifecycle.pins import Pins
from manyhats.lifecycle.warm import RecentUse
from manyhats.metrics import Metrics
from manyhats.telemetry.record import Tracer
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.limiter import Limiter, MemoryLimiter
from manyhats.tenancy.usage import UsageLedger
from manyhats.types import GrammarSpec


class GrammarValidator(Protocol):
    """Checks an output constraint before it is queued. Called on a worker thread, so it may take
    its time.
    """

    def check(self, spec: GrammarSpec) -> None:
        """Raises RequestError with ``param="response_format"`` for a schema that cannot be
        enforced.
        """


@dataclass(frozen=True, slots=True)
class ApiState:
    """Everything that the routes use. Set once by the composition root, never changed.

    ``operations`` None: nothing is registered from elsewhere; ``pins`` None: nothing is
    pinned; ``shadows`` None: none run.
    """

    settings: Settings
    engine: EngineClient
    adapters: AdapterDirectory
    metrics: Metrics
    grammar: GrammarValidator
    tenants: TenantDirectory
    limiter: Limiter = field(default_factory=MemoryLimiter)
    usage: UsageLedger = field(default_factory=UsageLedger)
    evaluations: EvaluationService | None = None
    store_reachable: Callable[[], bool] = lambda: True
    operations: Operations | None = None
    pins: Pins | None = None
    shadows: Shadows | None = None
    readiness: Readiness = field(default_factory=Readiness)
    recent: RecentUse = field(default_factory=RecentUse)
    drift_detection: Drift | None = None
    tracer: Tracer | None = None

    @property
    def drift(self) -> DriftMonitor | None:
        """Who is told of each answer; None where drift detection is off."""
        return None if self.drift_detection is None else self.drift_detection.monitor


def api_state(request: Request) -> ApiState:
    """The ``ApiState`` of the application that serves ``request``."""
    state: ApiState = request.app.state.manyhats
    return state
