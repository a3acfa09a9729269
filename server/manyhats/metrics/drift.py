"""The series of drift detection (``manyhats.drift``), their labels and why they are bounded.

``adapter`` is as in ``manyhats.metrics``; ``signal`` is a name out of ``drift.signals.SIGNALS``, a
closed list, or ``any``, which is 0 from the start; ``action`` and ``kind`` are closed lists too
(``drift.actions.Outcome``; ``finished``, ``rescored``, ``canary``); ``reason`` says why something
was not looked at (``queue``, ``failed``, ``rescoring``, ``too_long``, ``webhook``); ``label`` is
one of three kinds of feedback.

Types, units and meanings are in ``docs/metrics.md``, which a test holds to the code.
All gauges are of the version that the name means now.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from manyhats.metrics.labels import OTHER_LABEL, LabelCap, exemplar

_SIGNAL: Final = ("adapter", "signal")
_ADAPTER: Final = ("adapter",)
_ANY: Final = "any"
_ACTIONS: Final = ("hold", "end_canary", "rollback", "baseline", "failed", "dry_run")


class DriftMetrics:
    """The series of drift detection in ``registry``. Every method may be called on any thread."""

    def __init__(self, registry: CollectorRegistry, cap: LabelCap) -> None:
        self._registry = registry
        self._cap = cap
        self._score = self._gauge("drift_score", "Evidence of drift; 1 is the threshold.", _SIGNAL)
        self._psi = self._gauge("drift_psi", "Population stability index.", _SIGNAL)
        self._ks = self._gauge("drift_ks", "Kolmogorov-Smirnov distance.", _SIGNAL)
        self._e_value = self._gauge(
            "drift_log_e_value", "Logarithm of the sequential test's e-value.", _SIGNAL
        )
        self._kl = self._gauge("drift_kl_mean", "KL(adapter || base), nats a token.", _ADAPTER)
        self._agreement = self._gauge(
            "drift_agreement_ratio", "Tokens whose top choice is the base's.", _ADAPTER
        )
        self._reference = self._gauge(
            "drift_reference_samples", "Requests in the frozen reference.", _ADAPTER
        )
        self._stale = self._gauge("drift_stale", "1: not validated for its period.", _ADAPTER)
        self._samples = self._counter("drift_samples", "Requests looked at.", ("adapter", "kind"))
        self._dropped = self._counter("drift_dropped", "Not looked at, or not told.", ("reason",))
        self._alarms = self._counter("drift_alarms", "Alarms raised.", _SIGNAL)
        self._actions = self._counter("drift_actions", "Actions taken.", ("adapter", "action"))
        self._feedback = self._counter("feedback", "Feedback received.", ("adapter", "label"))

    def start_at_zero(self) -> None:
        """What has not happened yet is 0, not absent: for the label ``other``, signal ``any``."""
        for gauge in (self._score, self._psi, self._ks, self._e_value):
            gauge.labels(OTHER_LABEL, _ANY)
        for mean in (self._kl, self._reference, self._stale):
            mean.labels(OTHER_LABEL)
        self._agreement.labels(OTHER_LABEL).set(1)
        for kind in ("finished", "rescored", "canary"):
            self._samples.labels(OTHER_LABEL, kind)
        for reason in ("queue", "failed", "rescoring", "too_long", "webhook"):
            self._dropped.labels(reason)
        self._alarms.labels(OTHER_LABEL, _ANY)
        for action in _ACTIONS:
            self._actions.labels(OTHER_LABEL, action)
        for label in ("positive", "neutral", "negative"):
            self._feedback.labels(OTHER_LABEL, label)

    def scored(self, adapter: str, signal: str, score: float) -> None:
        """The evidence on one signal, as a share of what raises an alarm."""
        self._score.labels(self._cap.label(adapter), signal).set(score)

    def compared(self, adapter: str, signal: str, *, psi: float | None, ks: float | None) -> None:
        """A window was compared with the reference; None where a measure does not apply."""
        label = self._cap.label(adapter)
        if psi is not None:
            self._psi.labels(label, signal).set(psi)
        if ks is not None:
            self._ks.labels(label, signal).set(ks)

    def e_value(self, adapter: str, signal: str, logarithm: float) -> None:
        """The sequential test's e-value, its natural logarithm."""
        self._e_value.labels(self._cap.label(adapter), signal).set(logarithm)

    def against_base(self, adapter: str, *, kl: float, agreement: float) -> None:
        """Means over the window of rescored requests."""
        label = self._cap.label(adapter)
        self._kl.labels(label).set(kl)
        self._agreement.labels(label).set(agreement)

    def reference(self, adapter: str, samples: int) -> None:
        """The reference was frozen (or, 0, begun anew)."""
        self._reference.labels(self._cap.label(adapter)).set(samples)

    def stale(self, adapter: str, stale: bool) -> None:
        """Whether the name's stable version was not validated for its period."""
        self._stale.labels(self._cap.label(adapter)).set(stale)

    def sampled(self, adapter: str, kind: str) -> None:
        """A request was looked at."""
        self._samples.labels(self._cap.label(adapter), kind).inc()

    def dropped(self, reason: str) -> None:
        """Something was not looked at, or not told."""
        self._dropped.labels(reason).inc()

    def alarm(self, adapter: str, signal: str, request_id: str = "") -> None:
        """An alarm was raised; ``request_id``: a request to look at."""
        self._alarms.labels(self._cap.label(adapter), signal).inc(1, exemplar(request_id))

    def action(self, adapter: str, action: str) -> None:
        """The policy acted, or would have."""
        self._actions.labels(self._cap.label(adapter), action).inc()

    def feedback(self, adapter: str | None, label: str) -> None:
        """A tenant said what it thinks of an answer."""
        self._feedback.labels(self._cap.label(adapter), label).inc()

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"manyhats_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"manyhats_{name}", text, labels, registry=self._registry)
