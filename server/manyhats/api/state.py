"""What the routes stand on: one frozen object, put on the application by ``create_api``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request

from manyhats.api.readiness import Readiness
from manyhats.config import Settings
from manyhats.drift.build import Drift
from manyhats.drift.monitor import DriftMonitor
from manyhats.engine.interface import EngineClient
from manyhats.lifecycle.directory import AdapterDirectory
from manyhats.lifecycle.warm import RecentUse
from manyhats.metrics import Metrics
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
    """Everything that the routes use. Set once by the composition root, never changed."""

    settings: Settings
    engine: EngineClient
    adapters: AdapterDirectory
    metrics: Metrics
    grammar: GrammarValidator
    tenants: TenantDirectory
    limiter: Limiter = field(default_factory=MemoryLimiter)
    usage: UsageLedger = field(default_factory=UsageLedger)
    readiness: Readiness = field(default_factory=Readiness)
    recent: RecentUse = field(default_factory=RecentUse)
    drift_detection: Drift | None = None

    @property
    def drift(self) -> DriftMonitor | None:
        """Who is told of each answer; None where drift detection is off."""
        return None if self.drift_detection is None else self.drift_detection.monitor


def api_state(request: Request) -> ApiState:
    """The ``ApiState`` of the application that serves ``request``."""
    state: ApiState = request.app.state.manyhats
    return state
