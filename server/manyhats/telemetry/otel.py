"""Requests as OpenTelemetry spans and metrics (the extra ``manyhats[otel]``).

A request is a server span; below it, for each choice, ``queue`` (arrival to admission), ``prefill``
(to the first token) and ``decode`` (to the last), and ``load`` for each load of its adapter that
ended while it waited. Names of attributes and metrics are those of the semantic conventions for
HTTP and generative AI where these have one; ``manyhats.*`` else. Nothing that a caller wrote is an
attribute of anything: no prompt, no answer, no path.

Spans are made when the request has ended, out of its record, so tracing costs the way of a token
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from manyhats.engine.interface import EngineStats
from manyhats.telemetry.loads import LoadLog
from manyhats.telemetry.record import Choice, RequestRecord
from manyhats.telemetry.traceparent import HEADER, STATE_HEADER, TraceParent

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_PROPAGATOR = TraceContextTextMapPropagator()


class OtelTracer:
    """Implements ``telemetry.record.Tracer`` over two providers, which it shuts down at its end.

    ``model``: the base's id. Metrics have the tenant as an attribute only through ``tenant_label``,
    which bounds its values.
    """

    def __init__(
        self,
        spans: TracerProvider,
        meters: MeterProvider,
        *,
        loads: LoadLog,
        tenant_label: Callable[[str], str],
    ) -> None:
        self._spans = spans
        self._meters = meters
        self._loads = loads
        self._tenant_label = tenant_label
        self._tracer = spans.get_tracer("manyhats")
        self._meter = meter = meters.get_meter("manyhats")

        def seconds(name: str, what: str) -> Callable[[float, Mapping[str, str]], None]:
            made = meter.create_histogram(
                name, "s", what, explicit_bucket_boundaries_advisory=_SECONDS
            )
            return lambda value, attributes: made.record(value, attributes)

        self._http = seconds("http.server.request.duration", "one HTTP request")
        self._duration = seconds("gen_ai.server.request.duration", "one generation")
        self._first = seconds("gen_ai.server.time_to_first_token", "arrival to first token")
        self._each = seconds("gen_ai.server.time_per_output_token", "mean between two tokens")
        self._queued = seconds("manyhats.queue.duration", "arrival to admission")
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "tokens of one generation",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Shows the engine's sequences, running and waiting, at every export."""

        def observed(_: CallbackOptions) -> Iterable[Observation]:
            now = stats()
            yield Observation(now.running, {"state": "running"})
            yield Observation(now.waiting, {"state": "waiting"})

        self._meter.create_observable_gauge(
            "manyhats.sequences", [observed], "{sequence}", "sequences in the batch and the queue"
        )

    def begin(self, record: RequestRecord) -> None:
        """See ``Tracer``."""
        context = Context()
        if record.parent is not None:
            carrier = {HEADER: str(record.parent), STATE_HEADER: record.trace_state}
            context = _PROPAGATOR.extract(carrier, context)
        span = self._tracer.start_span(
            record.method, context, SpanKind.SERVER, start_time=record.started_ns
        )
        own = span.get_span_context()
        record.span = span
        record.trace = TraceParent(
            trace.format_trace_id(own.trace_id),
            trace.format_span_id(own.span_id),
            f"{own.trace_flags:02x}",
        )

    def end(self, record: RequestRecord) -> None:
        """See ``Tracer``."""
        span = cast(Span, record.span)
        if span.is_recording():
            self._describe(span, record)
            for index, choice in record.choices.items():
                self._phases(span, record, index, choice)
        span.end(record.unix_ns(record.ended))
        self._measure(record)

    def close(self) -> None:
        """Exports what is left. A collector that does not answer costs its timeout."""
        self._spans.shutdown()
        self._meters.shutdown()

    def _describe(self, span: Span, record: RequestRecord) -> None:
        span.update_name(f"{record.method} {record.route}")
        span.set_attributes(
            {
                "http.request.method": record.method,
                "http.route": record.route,
                "http.response.status_code": record.status,
                "manyhats.request_id": record.id,
            }
        )
        if record.tenant is not None:
            span.set_attribute("manyhats.tenant", record.tenant)
        if record.adapter is not None:
            span.set_attributes(
                {
                    "gen_ai.operation.name": _OPERATIONS.get(record.route, "text_completion"),
                    "gen_ai.usage.input_tokens": record.prompt_tokens,
                    "gen_ai.usage.output_tokens": record.output_tokens,
                    "manyhats.adapter": record.adapter,
                }
            )
        if record.status >= 500:  # of a server's span a 4xx is no error
            span.set_status(Status(StatusCode.ERROR))

    def _phases(self, parent: Span, record: RequestRecord, index: int, choice: Choice) -> None:
        end = choice.admitted or choice.first_token or record.ended
        self._child(parent, record, "queue", choice.arrival, end, {"manyhats.choice": index})
        if record.label is not None and index == 0:
            for load in self._loads.during(record.label, choice.arrival, end):
                self._child(
                    parent, record, "load", load.start, load.end, {"manyhats.tier": load.tier}
                )
        if choice.first_token is None or choice.last_token is None:
            return
        self._child(parent, record, "prefill", end, choice.first_token, {"manyhats.choice": index})
        attributes = {"manyhats.choice": index, "gen_ai.usage.output_tokens": choice.tokens}
        self._child(parent, record, "decode", choice.first_token, choice.last_token, attributes)

    def _child(
        self,
        parent: Span,
        record: RequestRecord,
        name: str,
        start: float,
        end: float,
        attributes: Mapping[str, int | str],
    ) -> None:
        span = self._tracer.start_span(
            name,
            trace.set_span_in_context(parent, Context()),
            attributes=attributes,
            start_time=record.unix_ns(start),
        )
        span.end(record.unix_ns(max(start, end)))

    def _measure(self, record: RequestRecord) -> None:
        self._http(
            record.duration_s,
            {
                "http.request.method": record.method,
                "http.route": record.route,
                "http.response.status_code": str(record.status),
            },
        )
        if record.adapter is None:
            return
        shown = {"gen_ai.operation.name": _OPERATIONS.get(record.route, "text_completion")}
        if record.tenant is not None:
            shown["manyhats.tenant"] = self._tenant_label(record.tenant)
        self._duration(record.duration_s, shown)
        self._tokens.record(record.prompt_tokens, {**shown, "gen_ai.token.type": "input"})
        self._tokens.record(record.output_tokens, {**shown, "gen_ai.token.type": "output"})
        for choice in record.choices.values():
            if choice.admitted is not None:
                self._queued(choice.admitted - choice.arrival, shown)
            if choice.first_token is not None and choice.last_token is not None:
                self._first(choice.first_token - choice.arrival, shown)
                if choice.tokens > 1:
                    mean = (choice.last_token - choice.first_token) / (choice.tokens - 1)
                    self._each(mean, shown)
