"""The series of the server itself, read at scrape: version, readiness, stores, device memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class ServerCollector(Collector):
    """Nothing is collected before ``watch``."""

    def __init__(self) -> None:
        self._version = ""
        self._ready: Callable[[], bool] | None = None
        self._stores: Callable[[], Mapping[str, bool]] = dict
        self.device: Callable[[], tuple[int, int]] | None = None
        """Gives (bytes in use, bytes in all) of the device's memory."""

    def watch(
        self, version: str, ready: Callable[[], bool], stores: Callable[[], Mapping[str, bool]]
    ) -> None:
        """``ready`` and ``stores`` (name to whether it answers) are called at every scrape."""
        self._version, self._ready, self._stores = version, ready, stores

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families are known once somebody watches."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Version, readiness, stores, the device's memory."""
        if self.device is not None:
            used, total = self.device()
            for name, text, value in (
                ("manyhats_device_memory_bytes", "The device's memory.", total),
                ("manyhats_device_memory_used_bytes", "In use of it.", used),
            ):
                yield GaugeMetricFamily(name, text, value=value)
        if self._ready is None:
            return
        build = GaugeMetricFamily("manyhats_build_info", "The version.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        yield GaugeMetricFamily("manyhats_ready", "Traffic should come: 1.", value=self._ready())
        stores = GaugeMetricFamily(
            "manyhats_store_up", "A store answers; while 0, memory does.", labels=["store"]
        )
        for store, answers in self._stores().items():
            stores.add_metric([store], answers)
        yield stores
