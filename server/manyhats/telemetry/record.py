"""What is known of one HTTP request for its log lines and spans."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from manyhats.telemetry.traceparent import TraceParent


@dataclass(slots=True)
class Choice:
    """When one choice came on; seconds of the monotonic clock. ``admitted``: its sequence left the
    queue for the batch.
    """

    arrival: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0


@dataclass(slots=True)
class RequestRecord:
    """One request, from its arrival to its end. Confined to the event loop's thread.

    Set by the middleware: ``id``, ``method``, ``route`` (a template, never a path), ``status``,
    ``started`` and ``ended`` (seconds, monotonic), ``started_ns`` (Unix time), ``parent`` (the
    caller's trace), ``trace`` (our own span where tracing is on, else the caller's). Set by the
    authorization: ``tenant``. Set by the generation: the rest; ``adapter`` is ``name@version``, the
    members of a composition, or ``baseline``, ``label`` what the metrics call it (None for the
    base). ``span`` is the tracer's own. No prompt and no answer is ever kept here.
    """

    id: str
    method: str
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    parent: TraceParent | None = None
    trace_state: str = ""
    trace: TraceParent | None = None
    route: str = ""
    status: int = 0
    ended: float = 0.0
    tenant: str | None = None
    adapter: str | None = None
    label: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)
    span: object = None

    @property
    def duration_s(self) -> float:
        """Seconds from arrival to the end of the answer."""
        return self.ended - self.started

    def unix_ns(self, monotonic_s: float) -> int:
        """A moment of the monotonic clock as Unix time, by the request's own pair of clocks."""
        return self.started_ns + round((monotonic_s - self.started) * 1e9)


class Tracer(Protocol):
    """What tells a tracing backend of requests; called on the event loop, must be quick."""

    def begin(self, record: RequestRecord) -> None:
        """Sets ``record.trace``."""

    def end(self, record: RequestRecord) -> None:
        """The request has ended, in whatever way; called once for each that began."""


_current: ContextVar[RequestRecord | None] = ContextVar("manyhats_request", default=None)


def current() -> RequestRecord | None:
    """The request that the running task or worker thread serves; None outside of any."""
    return _current.get()


def enter(record: RequestRecord) -> None:
    """Makes it the current one of this task and of what it starts."""
    _current.set(record)
