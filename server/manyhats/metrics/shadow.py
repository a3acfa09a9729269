"""The series of shadows: versions that run beside what answers, and are not answered with.

``adapter`` is bounded as everywhere; ``outcome`` is ``ok``, ``error`` or ``dropped``.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from manyhats.metrics.labels import LabelCap

_SECONDS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
_SHARES: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_NATS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class ShadowMetrics:
    """``manyhats_shadow_requests_total`` (adapter, outcome), ``manyhats_shadow_tokens_total``
    (adapter), and of those that came to an end, each by adapter: ``manyhats_shadow_seconds``,
    ``manyhats_shadow_agreement`` (share of equal tokens, 0 to 1) and ``manyhats_shadow_nll`` (what
    was answered, under the shadow: mean negative log-probability of a token, nats).
    """

    def __init__(self, registry: CollectorRegistry, cap: LabelCap) -> None:
        self._cap = cap
        name, labels = "manyhats_shadow", ("adapter",)
        self._requests = Counter(
            f"{name}_requests_total",
            "Requests that a shadow was to run beside.",
            ("adapter", "outcome"),
            registry=registry,
        )
        self._tokens = Counter(
            f"{name}_tokens_total", "Tokens that shadows generated.", labels, registry=registry
        )
        self._seconds = Histogram(
            f"{name}_seconds", "A shadow's run.", labels, buckets=_SECONDS, registry=registry
        )
        self._agreement = Histogram(
            f"{name}_agreement",
            "Share of a shadow's tokens that are the answer's.",
            labels,
            buckets=_SHARES,
            registry=registry,
        )
        self._nll = Histogram(
            f"{name}_nll",
            "Negative log-probability of the answer's tokens under the shadow, nats.",
            labels,
            buckets=_NATS,
            registry=registry,
        )

    def dropped(self, adapter: str) -> None:
        """A sample was given up: too many were at it."""
        self._requests.labels(self._cap.label(adapter), "dropped").inc()

    def failed(self, adapter: str) -> None:
        """A shadow's run ended with an error."""
        self._requests.labels(self._cap.label(adapter), "error").inc()

    def ran(
        self, adapter: str, tokens: int, seconds: float, agreement: float, nll: float | None
    ) -> None:
        """A shadow generated ``tokens`` in ``seconds``; ``nll`` None: nothing was answered."""
        label = self._cap.label(adapter)
        self._requests.labels(label, "ok").inc()
        self._tokens.labels(label).inc(tokens)
        self._seconds.labels(label).observe(seconds)
        self._agreement.labels(label).observe(agreement)
        if nll is not None:
            self._nll.labels(label).observe(nll)
