"""The gauges read from the engine's snapshot at scrape, so that none is older than the scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from manyhats.metrics.labels import LabelCap
from manyhats.types import AdapterRef


class ResidentView(Protocol):
    """One adapter on the device, as the collector reads it."""

    @property
    def ref(self) -> AdapterRef:
        """Which version."""

    @property
    def leases(self) -> int:
        """Sequences that hold it now."""


class StatsView(Protocol):
    """The engine's snapshot as the collector reads it (``engine.interface.EngineStats`` satisfies
    it).
    """

    @property
    def running(self) -> int:
        """Sequences in the batch."""

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""

    @property
    def kv_blocks_total(self) -> int:
        """Blocks of the KV cache."""

    @property
    def kv_blocks_used(self) -> int:
        """Of those, in use."""

    @property
    def kv_block_size(self) -> int:
        """Tokens in a block."""

    @property
    def slots_total(self) -> int:
        """Adapter slots of the device."""

    @property
    def rows_total(self) -> int:
        """Rank rows of the device pool."""

    @property
    def rows_used(self) -> int:
        """Of those, in use."""

    @property
    def host_bytes_used(self) -> int:
        """Bytes in the host tier."""

    @property
    def host_bytes_total(self) -> int:
        """Its bound."""

    @property
    def resident(self) -> Sequence[ResidentView]:
        """Adapters on the device."""

    @property
    def waiting_adapters(self) -> Sequence[str]:
        """Adapters on their way or waiting for a slot."""

    @property
    def steps(self) -> int:
        """Steps run."""

    @property
    def failed_steps(self) -> int:
        """Steps failed."""


class SnapshotCollector(Collector):
    """``source`` gives the snapshot; ``clock`` Unix seconds. Without a source there is nothing to
    collect.
    """

    def __init__(self, cap: LabelCap, clock: Callable[[], float]) -> None:
        self.source: Callable[[], StatsView] | None = None
        self._cap = cap
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families depend on the snapshot."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families of the snapshot; none before there is an engine."""
        if self.source is None:
            return
        stats = self.source()
        yield from _own_families(stats)
        yield self._leases(stats)
        yield from _gateway_families(stats, self._clock())

    def _leases(self, stats: StatsView) -> Metric:
        leases: dict[str, int] = {}
        for adapter in stats.resident:
            label = self._cap.label(adapter.ref.label)
            leases[label] = leases.get(label, 0) + adapter.leases
        family = GaugeMetricFamily(
            "manyhats_adapter_leases", "Sequences that hold a resident adapter.", labels=["adapter"]
        )
        for label, count in leases.items():
            family.add_metric([label], count)
        return family


def _own_families(stats: StatsView) -> Iterator[Metric]:
    gauges = {
        "running": ("Sequences in the batch.", stats.running),
        "waiting": ("Sequences in the queue.", stats.waiting),
        "kv_blocks": ("Blocks of the KV cache.", stats.kv_blocks_total),
        "kv_blocks_used": ("KV cache blocks in use.", stats.kv_blocks_used),
        "slots": ("Adapter slots of the device.", stats.slots_total),
        "slots_used": ("Adapter slots in use.", len(stats.resident)),
        "rows": ("Rank rows of the device pool.", stats.rows_total),
        "rows_used": ("Rank rows in use.", stats.rows_used),
        "host_bytes": ("Bound of the host tier.", stats.host_bytes_total),
        "host_bytes_used": ("Bytes in the host tier.", stats.host_bytes_used),
        "leases": ("Sequences that hold a slot.", sum(a.leases for a in stats.resident)),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"manyhats_{name}", text, value=value)
    yield CounterMetricFamily("manyhats_steps", "Steps run.", value=stats.steps)
    yield CounterMetricFamily("manyhats_failed_steps", "Steps failed.", value=stats.failed_steps)


def _named(waiting: str) -> str:
    """The label of ``name@version``, or of a composition, ``weighted(a@1:0.7,b@2:0.3)``."""
    kind, composed, _ = waiting.partition("(")
    return f"({kind})" if composed else waiting.partition("@")[0]


def _gateway_families(stats: StatsView, now: float) -> Iterator[Metric]:
    """The Gateway API Inference Extension's names and semantics."""
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters resident and waiting; the value is the time of the update.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    resident = ",".join(sorted({adapter.ref.label for adapter in stats.resident}))
    # requests name the adapter, so the list does too, whatever version is on its way
    waiting = ",".join(sorted({_named(name) for name in stats.waiting_adapters}))
    info.add_metric([str(stats.slots_total), resident, waiting], now)
    yield info
    yield GaugeMetricFamily("vllm:num_requests_running", "Running.", value=stats.running)
    yield GaugeMetricFamily("vllm:num_requests_waiting", "Waiting.", value=stats.waiting)
    used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "KV cache in use, 0 to 1.", value=used)
    cache = GaugeMetricFamily(
        "vllm:cache_config_info", "The KV cache.", labels=["block_size", "num_gpu_blocks"]
    )
    cache.add_metric([str(stats.kv_block_size), str(stats.kv_blocks_total)], 1)
    yield cache
