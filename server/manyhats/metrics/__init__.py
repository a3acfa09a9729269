"""Every Prometheus series, its labels and why they are bounded.

``adapter`` is an adapter's name, ``(stack)``, ``(weighted)`` or ``(ensemble)`` for every
composition that a request named, ``base`` for the bare base, or ``other``: the N busiest names
have a label of their own (``metrics.labels``; N = the setting ``metrics_adapters``), so the label
has at most N + 2 values; ``tenant`` likewise, with ``metrics_tenants``. ``quota`` is a field of
``tenancy.model.Quotas``. ``outcome`` is one of four finish reasons; ``measure`` is a field of
``lifecycle.evaluation.gate.Thresholds``; ``tier`` is ``host`` or ``device``; ``route`` is a
template of the application's own routes or ``unmatched``, never a path; ``method`` is one of
seven or ``other``;
``status`` is an HTTP status; ``backend`` has one value, the kernels in use, and ``version`` one;
``store`` is one of ours. What rates are taken of starts at zero (``base`` and ``other``, and the
routes that generate), so that an alert's expression always has a value.

Types, units and meanings are in ``docs/metrics.md``, which a test holds to the code.

The ``vllm:`` series are those of the Kubernetes Gateway API Inference Extension's model server
protocol. ``lora_requests_info`` has the labels ``max_lora`` (slots), ``running_lora_adapters``
(names resident on the device) and ``waiting_lora_adapters`` (names on their way), comma-separated;
only the current label set is exposed, so it is one series, of at most ``slots`` names.
``cache_config_info`` has ``block_size`` and ``num_gpu_blocks``. ``metrics.drift`` has the series
of drift detection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from prometheus_client import (
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.openmetrics import exposition as openmetrics

from manyhats.metrics.drift import DriftMetrics
from manyhats.metrics.labels import (
    BASE_LABEL,
    OTHER_LABEL,
    LabelCap,
    LabelledRegistry,
    exemplar,
)
from manyhats.metrics.lifecycle import LifecycleMetrics
from manyhats.metrics.server import ServerCollector
from manyhats.metrics.shadow import ShadowMetrics
from manyhats.metrics.snapshot import SnapshotCollector, StatsView
from manyhats.types import FinishReason

__all__ = [
    "BASE_LABEL",
    "CONTENT_TYPE",
    "OTHER_LABEL",
    "DriftMetrics",
    "LabelCap",
    "Metrics",
    "StatsView",
]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of ``Metrics.render`` where nobody asks for another."""
OPENMETRICS: Final = "application/openmetrics-text"
"""The media type whose exposition has exemplars."""

GENERATING: Final = ("/v1/completions", "/v1/chat/completions")
"""The routes whose answers are counted from zero."""
QUOTAS: Final = (
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_per_day",
    "concurrent_requests",
    "queued_requests",
)
"""Quotas that refuse with a time to come back."""

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# no creation time beside every counter and histogram: nothing here reads it
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _AdapterSeries:
    """One label's children, looked up once: the observer is called for every token."""

    ended: dict[FinishReason, Counter]
    prompt_tokens: Counter
    generation_tokens: Counter
    cached_tokens: Counter
    first_token: Histogram
    inter_token: Histogram
    queue: Histogram
    total: Histogram


class Metrics:
    """All series, in a registry of their own. Implements ``engine.interface.EngineObserver``.

    The observer's methods are called on the engine's threads, ``http`` on the event loop's,
    ``render`` on any.
    """

    def __init__(
        self,
        max_adapter_labels: int,
        *,
        max_tenant_labels: int = 200,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``clock`` gives Unix seconds for ``vllm:lora_requests_info``."""
        self.registry = LabelledRegistry()
        self._cap = LabelCap(max_adapter_labels, dropped=self._forget_adapter)
        self._tenants = LabelCap(max_tenant_labels, dropped=partial(self.registry.forget, "tenant"))
        self._series: dict[str, _AdapterSeries] = {}
        self.shadow = ShadowMetrics(self.registry, self._cap)
        self._snapshot = SnapshotCollector(self._cap, clock)
        self._declare_requests()
        self._declare_engine()
        self._declare_tenants()
        self.drift = DriftMetrics(self.registry, self._cap)
        self.lifecycle = LifecycleMetrics(self.registry, self._cap)
        self._server = ServerCollector()
        self.registry.register(self._snapshot)
        self.registry.register(self._server)
        ProcessCollector(registry=self.registry)
        self._start_at_zero()

    def watch(self, stats: Callable[[], StatsView]) -> None:
        """From now on every scrape reads the engine's snapshot from ``stats``."""
        self._snapshot.source = stats

    def watch_device(self, memory: Callable[[], tuple[int, int]]) -> None:
        """From now on every scrape reads (bytes in use, bytes in all) of the device's memory."""
        self._server.device = memory

    def watch_server(
        self, version: str, ready: Callable[[], bool], stores: Callable[[], Mapping[str, bool]]
    ) -> None:
        """See ``metrics.server.ServerCollector.watch``."""
        self._server.watch(version, ready, stores)

    def kernels(self, backend: str) -> None:
        """The engine computes with the kernels of this name. Said once, when it is built."""
        self._kernels.labels(backend).set(1)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """(the exposition, its content type): OpenMetrics, which carries the exemplars, for whoever
        accepts it, as Prometheus does; else Prometheus' text format.
        """
        if OPENMETRICS in accept:
            # its default turns the colon of a sample's name, a legal one, into an underscore
            text: bytes = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
                self.registry, escaping=openmetrics.ALLOWUTF8
            )
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE

    def http(self, route: str, method: str, status: int) -> None:
        """An HTTP request was answered; ``route`` is the route's template or ``unmatched``."""
        self._http.labels(route, method, str(status)).inc()

    def used(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        """A tenant's request has ended, which the engine had taken."""
        self._tenants.counted(tenant)
        label = self._tenants.label(tenant)
        self._tenant_requests.labels(label).inc()
        self._tenant_prompt_tokens.labels(label).inc(prompt_tokens)
        self._tenant_output_tokens.labels(label).inc(output_tokens)

    def refused(self, tenant: str, quota: str) -> None:
        """A request was refused; ``quota`` is the field's name."""
        self._refusals.labels(self._tenants.label(tenant), quota).inc()

    def step(self, seconds: float, prefill_tokens: int, decode_tokens: int, sequences: int) -> None:
        """See EngineObserver."""
        self._step_seconds.observe(seconds)
        self._prefill_tokens.inc(prefill_tokens)
        self._decode_tokens.inc(decode_tokens)
        self._batch_tokens.observe(prefill_tokens + decode_tokens)
        self._batch_sequences.observe(sequences)

    def queued(self, adapter: str | None, seconds: float) -> None:
        """See EngineObserver."""
        self._of(adapter).queue.observe(seconds)

    def first_token(self, adapter: str | None, seconds: float, request_id: str = "") -> None:
        """See EngineObserver."""
        self._of(adapter).first_token.observe(seconds, exemplar(request_id))

    def inter_token(self, adapter: str | None, seconds: float) -> None:
        """See EngineObserver."""
        self._of(adapter).inter_token.observe(seconds)

    def finished(
        self,
        adapter: str | None,
        reason: FinishReason,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        seconds: float,
        request_id: str = "",
    ) -> None:
        """See EngineObserver."""
        self._cap.counted(adapter)
        series = self._of(adapter)
        series.ended[reason].inc()
        series.prompt_tokens.inc(prompt_tokens)
        series.cached_tokens.inc(cached_tokens)
        series.generation_tokens.inc(output_tokens)
        series.total.observe(seconds, exemplar(request_id))

    def preempted(self) -> None:
        """See EngineObserver."""
        self._preemptions.inc()

    def adapter_loaded(self, adapter: str, tier: str, seconds: float) -> None:
        """See EngineObserver."""
        self._loads.labels(self._cap.label(adapter), tier).inc()
        self._load_seconds.labels(tier).observe(seconds)

    def adapter_load_failed(self, adapter: str) -> None:
        """See EngineObserver."""
        self._load_failures.labels(self._cap.label(adapter)).inc()

    def adapter_evicted(self, adapter: str, tier: str) -> None:
        """See EngineObserver."""
        self._evictions.labels(self._cap.label(adapter), tier).inc()

    def _forget_adapter(self, label: str) -> None:
        """The label went to a busier name."""
        self._series.pop(label, None)
        self.registry.forget("adapter", label)

    def _of(self, adapter: str | None) -> _AdapterSeries:
        return self._of_label(self._cap.label(adapter))

    def _of_label(self, label: str) -> _AdapterSeries:
        series = self._series.get(label)
        if series is None:  # two threads may both make it: the children are the same ones
            series = self._series[label] = _AdapterSeries(
                ended={reason: self._ended.labels(label, reason.value) for reason in FinishReason},
                prompt_tokens=self._prompt_tokens.labels(label),
                generation_tokens=self._generation_tokens.labels(label),
                cached_tokens=self._cached_tokens.labels(label),
                first_token=self._first_token.labels(label),
                inter_token=self._inter_token.labels(label),
                queue=self._queue.labels(label),
                total=self._total.labels(label),
            )
        return series

    def _declare_requests(self) -> None:
        adapter = ("adapter",)
        self._ended = self._counter("requests", "Choices ended.", ("adapter", "outcome"))
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.", adapter)
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.", adapter)
        self._cached_tokens = self._counter(
            "cached_prompt_tokens", "Prompt tokens served by the prefix cache.", adapter
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", adapter, _LONG
        )
        self._inter_token = self._histogram(
            "inter_token_seconds", "Between two tokens of a choice.", adapter, _SHORT
        )
        self._queue = self._histogram(
            "queue_seconds", "Arrival to first admission.", adapter, _LONG
        )
        self._total = self._histogram("request_seconds", "Arrival to end.", adapter, _LONG)
        self._http = self._counter("http_requests", "HTTP answers.", ("route", "method", "status"))

    def _declare_engine(self) -> None:
        self._kernels = Gauge(
            "manyhats_kernels_info", "The kernels in use.", ("backend",), registry=self.registry
        )
        self._step_seconds = self._histogram("step_seconds", "One step.", (), _SHORT)
        tokens = self._counter("step_tokens", "Tokens run.", ("kind",))
        self._prefill_tokens = tokens.labels("prefill")
        self._decode_tokens = tokens.labels("decode")
        self._batch_tokens = self._histogram(
            "step_batch_tokens", "Tokens in one step.", (), _COUNTS
        )
        self._batch_sequences = self._histogram(
            "step_batch_sequences", "Sequences in one step.", (), _COUNTS
        )
        self._preemptions = self._counter("preemptions", "Sequences that lost their blocks.", ())
        placed = ("adapter", "tier")
        self._loads = self._counter("adapter_loads", "Adapters brought to a tier.", placed)
        self._load_seconds = self._histogram(
            "adapter_load_seconds", "Time to bring an adapter to a tier.", ("tier",), _SHORT
        )
        self._evictions = self._counter("adapter_evictions", "Adapters that left a tier.", placed)
        self._load_failures = self._counter(
            "adapter_load_failures", "Adapters that could not be loaded.", ("adapter",)
        )

    def _start_at_zero(self) -> None:
        """A rate over what has not happened yet is 0, not absent."""
        for adapter in (BASE_LABEL, OTHER_LABEL):
            self._of_label(adapter)
        for tier in ("host", "device"):
            self._loads.labels(OTHER_LABEL, tier)
            self._evictions.labels(OTHER_LABEL, tier)
            self._load_seconds.labels(tier)
        self._load_failures.labels(OTHER_LABEL)
        for counter in (
            self._tenant_requests,
            self._tenant_prompt_tokens,
            self._tenant_output_tokens,
        ):
            counter.labels(OTHER_LABEL)
        for quota in QUOTAS:
            self._refusals.labels(OTHER_LABEL, quota)
        self.drift.start_at_zero()
        for route in GENERATING:
            for status in ("200", "429", "500", "503"):
                self._http.labels(route, "POST", status)

    def _declare_tenants(self) -> None:
        tenant = ("tenant",)
        self._tenant_requests = self._counter("tenant_requests", "Requests served.", tenant)
        self._tenant_prompt_tokens = self._counter(
            "tenant_prompt_tokens", "Prompt tokens of requests served.", tenant
        )
        self._tenant_output_tokens = self._counter(
            "tenant_output_tokens", "Tokens generated for a tenant.", tenant
        )
        self._refusals = self._counter(
            "quota_refusals", "Requests refused for a quota.", ("tenant", "quota")
        )

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"manyhats_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        return Histogram(f"manyhats_{name}", text, labels, buckets=buckets, registry=self.registry)
