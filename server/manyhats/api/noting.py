"""What a generation adds to the record of its request: who served it, how many tokens, and when."""

from __future__ import annotations

import time
from collections.abc import Callable

from manyhats.api.prompts import Job
from manyhats.telemetry.record import Choice, RequestRecord, current
from manyhats.types import OutputDelta


def noting(job: Job) -> Callable[[int, OutputDelta], None]:
    """Begins the generation's part of the current request's record.

    What it returns is to be told of each delta, with the index of its choice.
    """
    record = current()
    if record is None:
        return _nobody
    record.adapter = job.served_by
    record.label = None if job.adapter is None else job.adapter.label
    record.prompt_tokens = job.prompt_tokens
    for index in range(len(job.requests) * job.n):
        record.choices[index] = Choice(job.requests[index // job.n].arrival)
    return lambda index, delta: _note(record, index, delta)


def _note(record: RequestRecord, index: int, delta: OutputDelta) -> None:
    choice = record.choices[index]
    if delta.admitted_at is not None:
        choice.admitted = delta.admitted_at
    if delta.token_ids:
        now = time.monotonic()
        choice.first_token = choice.first_token or now
        choice.last_token = now
        choice.tokens += len(delta.token_ids)
        record.output_tokens += len(delta.token_ids)


def _nobody(_index: int, _delta: OutputDelta) -> None:
    """Outside of a request nobody asks."""
