"""Telling drift detection of each answer: what it was and how long it took, once it has ended."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from manyhats.api.metering import metered
from manyhats.api.prompts import Job
from manyhats.api.state import ApiState
from manyhats.drift.feedback import Answered
from manyhats.drift.monitor import DriftMonitor
from manyhats.drift.signals.finished import Ending, Finished
from manyhats.errors import AdapterLoadError, EngineFailedError
from manyhats.types import AdapterRef, FinishReason, KeptLogits, OutputDelta

_ENDINGS = {FinishReason.STOP: Ending.STOP, FinishReason.LENGTH: Ending.LENGTH}


@dataclass(slots=True)
class _Choice:
    """What has come of one choice so far."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    ending: Ending | None = None
    kept: KeptLogits | None = None

    def add(self, delta: OutputDelta, now: float) -> None:
        if delta.token_ids:
            self.first = self.first or now
            self.last = now
            self.token_ids += delta.token_ids
        if delta.text:
            self.text.append(delta.text)
        self.logprobs += [entry.logprob for entry in delta.logprobs]
        if delta.finish_reason is not None:
            self.ending = _ENDINGS.get(delta.finish_reason)
            self.kept = delta.kept


async def watched(state: ApiState, job: Job) -> AsyncGenerator[tuple[int, OutputDelta]]:
    """``metered``'s deltas; the monitor is told of each choice that ended, or failed with the
    server's error. What the client broke off, or what was refused, says nothing of the adapter.
    """
    monitor, adapter = state.drift, job.adapter
    if monitor is None or job.scoring or adapter is None:
        async with aclosing(metered(state, job)) as deltas:
            async for event in deltas:
                yield event
        if monitor is not None and not job.scoring:
            monitor.recent.remember(job.id, Answered(job.tenant, None))
        return
    if monitor.samples(job.id, job.tenant, adapter):
        job = replace(job, requests=tuple(replace(r, keeps_logits=True) for r in job.requests))
    choices = [_Choice() for _ in range(len(job.requests) * job.n)]
    try:
        async with aclosing(metered(state, job)) as deltas:
            async for index, delta in deltas:
                choices[index].add(delta, time.monotonic())
                yield index, delta
    except (AdapterLoadError, EngineFailedError) as error:
        _failed(monitor, job, adapter, choices, load=isinstance(error, AdapterLoadError))
        raise
    for index, choice in enumerate(choices):
        if choice.ending is not None:
            monitor.finished(_told(job, adapter, index, choice, choice.ending))


def _failed(
    monitor: DriftMonitor, job: Job, ref: AdapterRef, choices: list[_Choice], *, load: bool
) -> None:
    for index, choice in enumerate(choices):
        ending = choice.ending or Ending.ERROR
        monitor.finished(_told(job, ref, index, choice, ending, load=load))


def _told(
    job: Job,
    ref: AdapterRef,
    index: int,
    choice: _Choice,
    ending: Ending,
    *,
    load: bool = False,
) -> Finished:
    request = job.requests[index // job.n]
    params = request.params[index % job.n]
    count, came = len(choice.token_ids), bool(choice.token_ids)
    return Finished(
        request_id=job.id,
        tenant=job.tenant,
        adapter=ref,
        prompt_token_ids=request.prompt_token_ids,
        token_ids=tuple(choice.token_ids),
        text="".join(choice.text),
        ending=ending,
        logprobs=tuple(choice.logprobs),
        ttft_s=choice.first - request.arrival if came else None,
        inter_token_s=(choice.last - choice.first) / (count - 1) if count > 1 else None,
        json_asked=params.grammar is not None,
        load_failed=load,
        kept=choice.kept,
    )
