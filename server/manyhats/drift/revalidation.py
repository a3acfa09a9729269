"""Evaluations run again on a schedule: the gates that a version passed, once its period is over."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from manyhats.drift.actions import Actor
from manyhats.drift.policy import Policy
from manyhats.drift.validation import Validations
from manyhats.errors import ManyhatsError, ModelNotFoundError
from manyhats.lifecycle.records import Entry
from manyhats.types import TenantId

logger = logging.getLogger(__name__)

PERIOD_S: Final = 30.0
"""How often it is looked whether a validation has ended."""
BY: Final = "evaluation"


class Evaluations(Protocol):
    """The gates (``lifecycle.evaluation.service.EvaluationService``). Raises ManyhatsError."""

    async def start(self, name: str, tenant: TenantId, version: int | None) -> Mapping[str, Any]:
        """Begin to evaluate a version, or find it on its way. On the event loop."""

    def shown(self, name: str, tenant: TenantId, version: int) -> Mapping[str, Any]:
        """``report`` of a version's latest evaluation (None: none), ``job`` while one runs."""


class Owned(Protocol):
    """The names as their owners see them (``lifecycle.service.AdapterService``)."""

    def entry(self, name: str, tenant: TenantId) -> Entry:
        """Raises ModelNotFoundError."""


class Revalidation:
    """Belongs to the event loop; what blocks is done on worker threads."""

    def __init__(
        self,
        evaluations: Evaluations,
        names: Owned,
        actor: Actor,
        validations: Validations,
        clock: Callable[[], float],
    ) -> None:
        self._evaluations = evaluations
        self._names = names
        self._actor = actor
        self._validations = validations
        self._clock = clock
        self._keeping = threading.Lock()

    def evaluated(
        self, name: str, owner: TenantId, version: int, report: Mapping[str, Any]
    ) -> None:
        """An evaluation has ended, whoever asked for it. Blocks; raises ManyhatsError."""
        self._keep(self._names.entry(name, owner), version, report)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Evaluations are run again while the block runs."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def tick(self) -> None:
        """Take in what has been evaluated; begin what is due. Raises ServiceError (the store)."""
        for (owner, name), policy in (await asyncio.to_thread(self._actor.policies)).items():
            if not policy.revalidate_s:
                continue
            try:
                await self._look_at(name, owner, policy)
            except ModelNotFoundError:
                continue  # deleted; its policy waits for the owner to register it again
            except ManyhatsError as error:
                logger.error("%s is not validated again: %s", name, error.message)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.tick()
            except ManyhatsError as error:
                logger.error("nothing is validated again now: %s", error.message)
            except Exception:
                logger.exception("revalidation failed")

    async def _look_at(self, name: str, owner: TenantId, policy: Policy) -> None:
        entry = self._names.entry(name, owner)
        stable = entry.find(entry.route.stable)
        if stable is None:
            return
        version = stable.ref.version
        found = await asyncio.to_thread(self._evaluations.shown, name, owner, version)
        if (report := found["report"]) is not None:
            await asyncio.to_thread(self._keep, entry, version, report)
        tried = await asyncio.to_thread(self._tried, entry, version)
        since = max(tried, default=float(stable.created))
        if "job" not in found and self._clock() >= since + policy.revalidate_s:
            await self._evaluations.start(name, owner, version)

    def _keep(self, entry: Entry, version: int, report: Mapping[str, Any]) -> None:
        """An evaluation's outcome into the series, once."""
        at = float(report["started"])
        with self._keeping:
            if any(known >= at for known in self._tried(entry, version)):
                return
            figures = {row["measure"]: row["value"] for row in report["rows"]}
            self._validations.add(
                entry, version, passed=bool(report["passed"]), by=BY, figures=figures, at=at
            )

    def _tried(self, entry: Entry, version: int) -> list[float]:
        """When the version was evaluated, passed or not."""
        series = self._validations.series(entry)
        return [float(o["at"]) for o in series if o["version"] == version and o["by"] == BY]
