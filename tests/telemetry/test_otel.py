"""Requests as spans and metrics, read back from OpenTelemetry's in-memory exporters."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.api import Api, settings_of

from manyhats.errors import ConfigError, EngineFailedError
from manyhats.metrics import LabelCap, Metrics
from manyhats.telemetry.build import open_telemetry, wanted
from manyhats.telemetry.loads import LoadLog
from manyhats.telemetry.otel import OtelTracer
from manyhats.telemetry.traceparent import TraceParent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HTTP = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}


class Traced:
    """The application with a tracer that keeps everything in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        spans = TracerProvider()
        spans.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.loads = LoadLog(Metrics(4))
        tracer = OtelTracer(
            spans, MeterProvider([self.reader]), loads=self.loads, tenant_label=LabelCap(2).label
        )
        self.api = Api(tracer=tracer)
        tracer.watch(self.api.engine.stats)

    def spans(self) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self.exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found

    def metrics(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def hexed(span: ReadableSpan) -> tuple[str, str]:
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def test_a_request_is_a_span_with_its_phases_below() -> None:
    traced = Traced()
    before = time.time_ns()
    answer = traced.api.complete(model="pirate", max_tokens=4, headers=HTTP)
    after = time.time_ns()
    spans = traced.spans()
    assert {name: len(some) for name, some in spans.items()} == {
        "POST /v1/completions": 1,
        "queue": 1,
        "prefill": 1,
        "decode": 1,
    }
    (server,) = spans["POST /v1/completions"]
    assert server.kind is SpanKind.SERVER
    assert hexed(server)[0] == TRACE
    assert f"{server.parent.span_id:016x}" == SPAN
    assert server.context.trace_state["vendor"] == "1"
    assert answer.headers["traceparent"] == "-".join(("00", *hexed(server), "01"))
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "manyhats.request_id": answer.headers["x-request-id"],
        "manyhats.tenant": "default",
        "manyhats.adapter": "pirate@2",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.usage.input_tokens": answer.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 4,
    }
    phases = [spans[name][0] for name in ("queue", "prefill", "decode")]
    for phase in phases:
        assert phase.parent.span_id == server.context.span_id
    moments = [m for phase in phases for m in (phase.start_time, phase.end_time)]
    assert [before, server.start_time, *moments, server.end_time, after] == sorted(
        [before, server.start_time, *moments, server.end_time, after]
    )
    assert moments[1:5:2] == moments[2:5:2], "one phase begins where the one before ended"
    assert phases[2].attributes["gen_ai.usage.output_tokens"] == 4


def test_each_choice_has_phases_of_its_own() -> None:
    traced = Traced()
    traced.api.complete(prompt=["a", "b"], n=2, max_tokens=3)
    for name in ("queue", "prefill", "decode"):
        choices = sorted(span.attributes["manyhats.choice"] for span in traced.spans()[name])
        assert choices == [0, 1, 2, 3]


def test_loads_of_the_adapter_that_ended_while_it_waited_are_spans() -> None:
    log = LoadLog(Metrics(4))
    log.adapter_loaded("pirate", "host", 0.5)
    middle = time.monotonic()
    log.adapter_loaded("haiku", "host", 0.5)
    log.adapter_loaded("pirate", "device", 0.25)
    (load,) = log.during("pirate", middle, time.monotonic())
    assert (load.tier, load.end - load.start) == ("device", pytest.approx(0.25))
    assert [load.tier for load in log.during("pirate", 0.0, middle)] == ["host"]

    traced = Traced()
    inner = traced.api.engine._delta
    told: list[int] = []

    def loading(request: Any, *rest: Any) -> Any:
        if not told:
            told.append(1)
            traced.loads.adapter_loaded("pirate", "device", 0.01)
            traced.loads.adapter_loaded("haiku", "device", 0.01)
        return inner(request, *rest)

    traced.api.engine._delta = loading
    traced.api.complete(model="pirate")
    (span,) = traced.spans()["load"]
    assert span.attributes == {"manyhats.tier": "device"}
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(0.01, rel=1e-3)
    assert traced.metrics() is not None


def test_our_failures_are_errors_of_the_span_and_callers_mistakes_are_not() -> None:
    traced = Traced()
    traced.api.complete(max_tokens=0)
    traced.api.engine.error, traced.api.engine.error_after = EngineFailedError("broken"), 0
    traced.api.complete()
    mistake, failure = traced.spans()["POST /v1/completions"]
    assert (mistake.attributes["http.response.status_code"], mistake.status.status_code) == (
        400,
        StatusCode.UNSET,
    )
    assert (failure.attributes["http.response.status_code"], failure.status.status_code) == (
        500,
        StatusCode.ERROR,
    )


def test_a_caller_that_does_not_sample_is_followed_and_a_trace_begins_without_one() -> None:
    traced = Traced()
    unsampled = f"00-{TRACE}-{SPAN}-00"
    answer = traced.api.complete(headers={"traceparent": unsampled})
    assert traced.spans() == {}
    own = TraceParent.parse(answer.headers["traceparent"])
    assert own is not None
    assert (own.trace_id, own.flags) == (TRACE, "00")
    assert own.span_id != SPAN
    for bad in ("nonsense", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01"):
        answer = traced.api.complete(headers={"traceparent": bad})
        assert TRACE not in answer.headers["traceparent"]
    assert [span.parent for span in traced.spans()["POST /v1/completions"]] == [None] * 3


def test_nothing_that_a_caller_wrote_is_in_a_span() -> None:
    traced, secret = Traced(), "xyzzy-secret"
    traced.api.complete(prompt=secret)
    traced.api.complete(prompt=secret, model=secret)
    traced.api.get(f"/v1/models/{secret}")
    traced.api.get(f"/{secret}")
    traced.api.send(secret.upper(), "/v1/models")
    spans = traced.exporter.get_finished_spans()
    assert len(spans) >= 7
    assert secret not in "".join(span.to_json() for span in spans).lower()
    shown = repr(traced.metrics())
    assert secret not in shown.lower()


def test_metrics_have_what_a_dashboard_asks_for() -> None:
    traced = Traced()
    traced.api.complete(model="pirate", max_tokens=6)
    traced.api.complete(max_tokens=2)
    traced.api.get("/healthz")
    metrics = traced.metrics()
    labels = {"gen_ai.operation.name": "text_completion", "manyhats.tenant": "default"}
    for name in (
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "manyhats.queue.duration",
    ):
        (point,) = metrics[name]
        assert (point.count, dict(point.attributes)) == (2, labels), name
        assert point.sum >= 0
    tokens = {p.attributes["gen_ai.token.type"]: p for p in metrics["gen_ai.client.token.usage"]}
    assert (tokens["output"].sum, tokens["output"].count) == (8, 2)
    assert tokens["input"].sum > 0
    routes = {p.attributes["http.route"]: p.count for p in metrics["http.server.request.duration"]}
    assert routes == {"/v1/completions": 2, "/healthz": 1}
    running = {p.attributes["state"]: p.value for p in metrics["manyhats.sequences"]}
    assert running == {"running": 3, "waiting": 4}


def test_the_tenants_label_is_bounded() -> None:
    label = LabelCap(2).label
    assert [label(tenant) for tenant in ("a", "b", "c", "a")] == ["a", "b", "other", "a"]


@given(
    st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8), st.binary(max_size=40)
)
def test_traceparents_are_read_as_the_standard_says(trace: bytes, span: bytes, junk: bytes) -> None:
    text = f"00-{trace.hex()}-{span.hex()}-01"
    parsed = TraceParent.parse(text)
    assert (parsed is None) == (not any(trace) or not any(span))
    if parsed is not None:
        assert str(parsed) == text
        assert TraceParent.parse("cc" + text[2:] + "-more") is not None, "later versions may add"
        assert TraceParent.parse(text + "-more") is None
        assert TraceParent.parse("ff" + text[2:]) is None
        assert TraceParent.parse(text.upper()) is None or text.upper() == text
    assert TraceParent.parse(junk.decode("latin-1")) is None


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "METRICS_ENDPOINT", "PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name in ("SDK_DISABLED", "TRACES_EXPORTER", "METRICS_EXPORTER"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)
    return monkeypatch


def test_it_is_off_unless_asked_for(environment: pytest.MonkeyPatch) -> None:
    assert not wanted(settings_of())
    assert wanted(settings_of(otel_endpoint="http://collector:4318"))
    environment.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:4318/v1/traces")
    assert wanted(settings_of())
    environment.setenv("OTEL_SDK_DISABLED", "true")
    assert not wanted(settings_of(otel_endpoint="http://collector:4318"))


def test_what_cannot_be_done_is_refused_by_name(environment: pytest.MonkeyPatch) -> None:
    asked = settings_of(otel_endpoint="http://collector:4318")
    environment.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        wanted(asked)
    environment.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    environment.setenv("OTEL_METRICS_EXPORTER", "console")
    with pytest.raises(ConfigError, match="OTEL_METRICS_EXPORTER is 'console'"):
        open_telemetry(asked, LoadLog(Metrics(4)), str)
    environment.setattr("manyhats.telemetry.build.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'manyhats\[otel\]'"):
        wanted(asked)
