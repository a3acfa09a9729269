"""Evaluations of one server: settings, runs beside live traffic, reports, and the gate.

A run is a task on the event loop; one runs at a time, a few wait. Its report replaces the version's
former one only once it is whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from manyhats.engine.interface import ChatTemplateError, EngineClient
from manyhats.errors import (
    ConflictError,
    EngineFailedError,
    ManyhatsError,
    ModelNotFoundError,
    NotFoundError,
    QueueFullError,
    RequestError,
)
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.evaluation.gate import Thresholds, judge
from manyhats.lifecycle.evaluation.probes import (
    Pair,
    Rule,
    general_pairs,
    prompt_tokens,
    read_pairs,
    read_rules,
    tokens_of,
)
from manyhats.lifecycle.evaluation.run import Plan, Progress, ScoredPair, measure
from manyhats.lifecycle.evaluation.store import EvaluationSettings, EvaluationStore
from manyhats.lifecycle.records import Entry, Registration
from manyhats.lifecycle.routes import BASELINE
from manyhats.lifecycle.states import Require, Verdict
from manyhats.types import AdapterRef, TenantId

logger = logging.getLogger(__name__)

MAX_JOBS: Final = 8
"""Evaluations that run or wait."""


class Names(Protocol):
    """Adapters by name, as their owner sees them."""

    def entry(self, name: str, tenant: TenantId) -> Entry:
        """Raises ModelNotFoundError."""


Observe = Callable[[str, Mapping[str, float | None], bool], None]
"""Told of a finished evaluation: adapter, value by measure, whether it passed."""


Ended = Callable[[Plan, Sequence[ScoredPair], Mapping[str, Any]], None]
"""Told of a finished evaluation: what it was of, the name's own pairs, its report. May block, and
raise ManyhatsError.
"""


@dataclass(slots=True)
class _Job:
    ref: AdapterRef
    progress: Progress
    started: float
    cause: Cause
    error: str = ""
    task: asyncio.Task[None] | None = None

    def shown(self) -> dict[str, Any]:
        state = "failed" if self.error else "evaluating"
        job = {"state": state, "done": self.progress.done, "total": self.progress.total}
        return {**job, "error": self.error} if self.error else job


class EvaluationService:
    """``start``, ``close`` and ``job`` belong to the event loop; the others block on the disk."""

    def __init__(
        self, engine: EngineClient, names: Names, store: EvaluationStore, observe: Observe
    ) -> None:
        self._engine = engine
        self._names = names
        self._store = store
        self._observe = observe
        self.ended: Ended | None = None
        self._jobs: dict[tuple[TenantId, str, int], _Job] = {}
        self._turn = asyncio.Lock()
        self._told: dict[str, Verdict] = {}
        self.tell()

    def tell(self) -> None:
        """Tell ``observe`` of each name's newest verdict, whichever server gave it, once."""
        for name, verdict in self._store.verdicts():
            if self._told.get(name) != verdict:
                self._told[name] = verdict
                self._observe(name, verdict.values, verdict.passed)

    # -- what a name is asked and judged by

    def check(self, data: str | None, rules: str | None) -> None:
        """Raises RequestError naming the field and the line that cannot be measured."""
        for number, pair in enumerate(read_pairs(data or ""), 1):
            self._check_pair(pair, f"data: pair {number}")
        for number, rule in enumerate(read_rules(rules or ""), 1):
            self._check_rule(rule, f"rules: rule {number}")

    def configure(
        self,
        name: str,
        tenant: TenantId,
        cause: Cause,
        *,
        data: str | None = None,
        rules: str | None = None,
        thresholds: Thresholds | None = None,
        require: Require | None = None,
    ) -> EvaluationSettings:
        """Replace what is given. Raises ModelNotFoundError, RequestError, ServiceError."""
        self._names.entry(name, tenant)
        self.check(data, rules)
        return self._store.write(
            name, cause, data=data, rules=rules, thresholds=thresholds, require=require
        )

    def settings(self, name: str, tenant: TenantId) -> EvaluationSettings:
        """What is there. Raises ModelNotFoundError, ServiceError."""
        return self._store.settings(self._names.entry(name, tenant))

    # -- running

    async def start(
        self, name: str, tenant: TenantId, version: int | None, cause: Cause | None = None
    ) -> dict[str, Any]:
        """Begin to evaluate a version (None: the newest), or find it on its way.

        ``cause``: what the audit log keeps with the verdict.

        Raises ModelNotFoundError, ConflictError (retired, or an ensemble, which cannot be scored),
        QueueFullError, ServiceError.
        """
        entry = self._names.entry(name, tenant)
        number = version or entry.versions[-1].ref.version
        record = entry.get(entry.ready(number))
        _check_scorable(record.ref)
        key = (tenant, name, number)
        job = self._jobs.get(key)
        if job is None or job.error:
            running = sum(1 for j in self._jobs.values() if not j.error)
            if running >= MAX_JOBS:
                raise QueueFullError(
                    f"{running} evaluations run or wait, of at most {MAX_JOBS}", retry_after_s=10
                )
            failed = [k for k, j in self._jobs.items() if j.error]
            for old in failed[:-MAX_JOBS]:
                del self._jobs[old]
            settings = await asyncio.to_thread(self._store.settings, entry)
            plan = self._plan(entry, record.ref, tenant, settings)
            job = self._jobs[key] = _Job(
                record.ref, Progress(plan.probes), time.time(), cause or Cause()
            )
            job.task = asyncio.create_task(self._run(key, job, plan, settings))
        return {"adapter": str(record.ref), **job.shown()}

    async def close(self) -> None:
        """End what runs."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _plan(
        self, entry: Entry, ref: AdapterRef, tenant: TenantId, settings: EvaluationSettings
    ) -> Plan:
        stable = entry.route.stable
        against = entry.find(stable) if stable not in (BASELINE, ref.version) else None
        if against is not None:
            _check_scorable(against.ref)
        return Plan(
            tenant=tenant,
            candidate=ref,
            stable=against.ref if against is not None else None,
            own=settings.data,
            general=general_pairs(),
            rules=settings.rules,
        )

    async def _run(
        self, key: tuple[TenantId, str, int], job: _Job, plan: Plan, settings: EvaluationSettings
    ) -> None:
        try:
            async with self._turn:
                measured = await measure(self._engine, plan, job.progress)
            rows = judge(measured.values, settings.thresholds)
            passed = all(row.passed for row in rows)
            report = {
                "adapter": str(plan.candidate),
                "digest": plan.candidate.digest,
                "against": str(plan.stable) if plan.stable else None,
                "started": int(job.started),
                "seconds": round(time.time() - job.started, 3),
                "passed": passed,
                "rows": [row.shown() for row in rows],
                "lanes": measured.lanes,
                "rules": measured.rules,
            }
            verdict = Verdict(
                at=int(time.time()),
                passed=passed,
                own=bool(plan.own or plan.rules),
                values={row.measure: row.value for row in rows},
                failed=tuple(row.described() for row in rows if not row.passed),
            )
            await asyncio.to_thread(self._store.keep, job.ref, job.cause, verdict, report)
            self.tell()
            if self.ended is not None:
                await asyncio.to_thread(self.ended, plan, measured.pairs, report)
            del self._jobs[key]
            logger.info(
                "evaluation of %s: %s",
                plan.candidate,
                "passed" if passed else f"failed: {'; '.join(verdict.failed)}",
            )
        except* asyncio.CancelledError:
            job.error = "the server stopped"
        except* ManyhatsError as errors:
            job.error = _first(errors).message
            logger.error("evaluation of %s: %s", plan.candidate, job.error)
        except* Exception as errors:
            job.error = "the server's defect; see its log"
            logger.exception("evaluation of %s", plan.candidate, exc_info=errors)

    # -- what came of it

    def shown(self, name: str, tenant: TenantId, version: int) -> dict[str, Any]:
        """State and report of a version. Raises ModelNotFoundError, ServiceError."""
        record = self._names.entry(name, tenant).get(version)
        report = self._store.report(name, version) if record.verdict else None
        job = self._jobs.get((tenant, name, version))
        shown: dict[str, Any] = {"state": record.state.value, "report": report}
        if job is not None:
            shown["job"] = job.shown()
            if not job.error:
                shown["state"] = "evaluating"
        return shown

    def report(self, name: str, tenant: TenantId, version: int) -> dict[str, Any]:
        """As ``shown``, of a version that was evaluated or is. Raises NotFoundError else."""
        found = self.shown(name, tenant, version)
        if found["report"] is None and "job" not in found:
            raise NotFoundError(f"{name}@{version} was never evaluated", param="version")
        return found

    def objection(self, name: str, tenant: TenantId, version: int) -> str | None:
        """Why requests should not be routed to a version, None where nothing speaks against it."""
        if version == BASELINE:
            return None
        entry = self._names.entry(name, tenant)
        verdict, require = entry.get(version).verdict, entry.demands.require
        if verdict is not None and not verdict.passed:
            told = "; ".join(verdict.failed[:3])
            return f"{name}@{version} has failed its evaluation: {told}"
        if require.met_by(verdict):
            return None
        on = " on pairs or rules of its own" if require is Require.READY else ""
        return f"{name}@{version} was not evaluated{on}, which {name!r} requires"

    def admitted(self, name: str, tenant: TenantId, told: Registration) -> Registration:
        """A registration under what the name requires: a new version is not routed to unseen.

        Raises ConflictError where it asks for just that.
        """
        try:
            require = self._names.entry(name, tenant).demands.require
        except ModelNotFoundError:
            return told
        if require is Require.NONE:
            return told
        if told.promote:
            raise ConflictError(
                f"{name!r} requires an evaluation before a version is promoted", param="promote"
            )
        return replace(told, promote=False)

    def _check_pair(self, pair: Pair, where: str) -> None:
        try:
            ids, start = tokens_of(pair, self._engine.tokenizer)
        except ChatTemplateError as error:
            raise RequestError(f"{where}: messages: {error}", param="data") from None
        bound, context = self._engine.max_compared_tokens, self._engine.model.context_len
        if not 0 < start < len(ids):
            raise RequestError(f"{where}: prompt and completion need a token each", param="data")
        if len(ids) > context or len(ids) - start > bound:
            raise RequestError(
                f"{where}: {len(ids)} tokens, {len(ids) - start} of them the completion's; at most "
                f"{context} and {bound}",
                param="data",
            )

    def _check_rule(self, rule: Rule, where: str) -> None:
        try:
            ids = prompt_tokens(rule, self._engine.tokenizer)
        except ChatTemplateError as error:
            raise RequestError(f"{where}: messages: {error}", param="rules") from None
        context = self._engine.model.context_len
        if not ids or len(ids) + rule.max_tokens > context:
            raise RequestError(
                f"{where}: {len(ids)} tokens and max_tokens {rule.max_tokens}; from 1 token on, "
                f"together at most {context}",
                param="rules",
            )


def _first(errors: BaseExceptionGroup[ManyhatsError]) -> ManyhatsError:
    """One of them; the others are its consequences, or the same."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, ManyhatsError) else EngineFailedError(str(error))


def _check_scorable(ref: AdapterRef) -> None:
    if ref.is_ensemble:
        raise ConflictError(
            f"{ref} is an ensemble, which cannot be evaluated: its members can", param="version"
        )
