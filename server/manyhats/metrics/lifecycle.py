"""The series of the adapters' lives: their evaluations, and the bytes that are collected."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from manyhats.metrics.labels import LabelCap


class LifecycleMetrics:
    """Told by ``lifecycle``; any thread."""

    def __init__(self, registry: CollectorRegistry, cap: LabelCap) -> None:
        self._cap = cap
        self._evaluation = Gauge(
            "manyhats_evaluation",
            "Measures of the adapter's last evaluation.",
            ("adapter", "measure"),
            registry=registry,
        )
        self._passed = Gauge(
            "manyhats_evaluation_passed",
            "Whether the adapter's last evaluation was passed.",
            ("adapter",),
            registry=registry,
        )
        self._resident = Counter(
            "manyhats_adapter_resident_seconds",
            "Time that an adapter's versions were on the device.",
            ("adapter",),
            registry=registry,
        )
        self._held = Gauge(
            "manyhats_adapter_bytes",
            "Bytes that an adapter's versions take.",
            ("adapter",),
            registry=registry,
        )
        self._versions = Counter(
            "manyhats_gc_versions", "Retired versions collected.", registry=registry
        )
        self._bytes = Counter("manyhats_gc_bytes", "Bytes collected.", registry=registry)

    def evaluated(self, adapter: str, values: Mapping[str, float | None], passed: bool) -> None:
        """A version of the adapter was evaluated; a value of None is undefined."""
        label = self._cap.label(adapter)
        for measure, value in values.items():
            self._evaluation.labels(label, measure).set(math.nan if value is None else value)
        self._passed.labels(label).set(passed)

    def occupied(self, adapter: str, seconds: int) -> None:
        """An adapter was on the device for so long."""
        self._resident.labels(self._cap.label(adapter)).inc(seconds)

    def sized(self, nbytes: Mapping[str, int]) -> None:
        """What the versions of every adapter take now."""
        found: dict[str, int] = {}
        for adapter, size in nbytes.items():
            label = self._cap.label(adapter)
            found[label] = found.get(label, 0) + size
        self._held.clear()
        for label, size in found.items():
            self._held.labels(label).set(size)

    def collected(self, versions: int, nbytes: int) -> None:
        """So much was removed that had had its time."""
        self._versions.inc(versions)
        self._bytes.inc(nbytes)
