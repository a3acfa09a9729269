"""Sets OpenTelemetry up, where it is asked for: by ``--otel-endpoint`` or the OTEL_* variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import manyhats
from manyhats.config import Settings, otel_variable
from manyhats.errors import ConfigError
from manyhats.telemetry.loads import LoadLog

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from manyhats.telemetry.otel import OtelTracer

_ENDPOINTS = (
    "EXPORTER_OTLP_ENDPOINT",
    "EXPORTER_OTLP_TRACES_ENDPOINT",
    "EXPORTER_OTLP_METRICS_ENDPOINT",
)


@dataclass(frozen=True, slots=True)
class _Signals:
    """What is exported."""

    traces: bool
    metrics: bool


def wanted(settings: Settings) -> bool:
    """Whether somebody asked for OpenTelemetry. Raises ConfigError for what we cannot do."""
    if otel_variable("SDK_DISABLED").lower() == "true":
        return False
    if settings.otel_endpoint is None and not any(map(otel_variable, _ENDPOINTS)):
        return False
    for part in ("", "TRACES_", "METRICS_"):
        name = f"EXPORTER_OTLP_{part}PROTOCOL"
        if otel_variable(name) not in ("", "http/protobuf"):
            raise ConfigError(
                f"OTEL_{name} is {otel_variable(name)!r}; only http/protobuf is spoken here",
                param=f"OTEL_{name}",
            )
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        raise ConfigError(
            "otel_endpoint (or an OTEL_* variable) asks for OpenTelemetry, which is not "
            "installed: pip install 'manyhats[otel]'",
            param="otel_endpoint",
        )
    return True


def open_telemetry(
    settings: Settings, loads: LoadLog, tenant_label: Callable[[str], str]
) -> OtelTracer:
    """The tracer, exporting in the background. Call it where ``wanted``.

    Batches, timeouts, sampling and the service's name are the SDK's own OTEL_* variables.
    """
    # Imported here, for a server that does not trace must not need them.
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider

    from manyhats.telemetry.otel import OtelTracer

    signals = _Signals(traces=_exported("TRACES"), metrics=_exported("METRICS"))
    resource = _resource()
    spans = TracerProvider(resource=resource, shutdown_on_exit=False)
    if signals.traces:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        span_exporter = OTLPSpanExporter(endpoint=_endpoint(settings, "traces"))
        spans.add_span_processor(BatchSpanProcessor(span_exporter))
    readers = []
    if signals.metrics:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        metric_exporter = OTLPMetricExporter(endpoint=_endpoint(settings, "metrics"))
        readers.append(PeriodicExportingMetricReader(metric_exporter))
    meters = MeterProvider(readers, resource, shutdown_on_exit=False)
    return OtelTracer(spans, meters, loads=loads, tenant_label=tenant_label)


def _exported(signal: str) -> bool:
    chosen = otel_variable(f"{signal}_EXPORTER") or "otlp"
    if chosen not in ("otlp", "none"):
        raise ConfigError(
            f"OTEL_{signal}_EXPORTER is {chosen!r}; otlp and none are known here",
            param=f"OTEL_{signal}_EXPORTER",
        )
    return chosen == "otlp"


def _endpoint(settings: Settings, signal: str) -> str | None:
    """Where a signal goes; None leaves it to the exporter, which reads the variables."""
    base = settings.otel_endpoint
    return None if base is None else f"{base.rstrip('/')}/v1/{signal}"


def _resource() -> Resource:
    """Who we are; what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes over our own."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = Resource({"service.name": "manyhats", "service.version": manyhats.__version__})
    return Resource.create().merge(ours).merge(OTELResourceDetector().detect())
