"""The series of drift detection (``manyhats.drift``), their labels and why they are bounded.

``adapter`` is as in ``manyhats.metrics``; ``signal`` is a name out of ``drift.signals.SIGNALS``, a
closed list; ``action`` and ``kind`` are closed lists too (``drift.policy.Action``; ``finished``,
``rescored``, ``canary``); ``reason`` says why something was not looked at (``queue``, ``failed``,
``rescoring``, ``too_long``, ``webhook``); ``label`` is one of three kinds of feedback.

================================  =======  ===============  ===================================
series                            type     labels           meaning
================================  =======  ===============  ===================================
manyhats_drift_score              gauge    adapter, signal  evidence of drift; 1 is the threshold
manyhats_drift_psi                gauge    adapter, signal  population stability index
manyhats_drift_ks                 gauge    adapter, signal  Kolmogorov-Smirnov distance
manyhats_drift_log_e_value        gauge    adapter, signal  natural logarithm, sequential test
manyhats_drift_kl_mean            gauge    adapter          KL(adapter || base), nats a token
manyhats_drift_agreement_ratio    gauge    adapter          tokens whose top choice is the base's
manyhats_drift_reference_samples  gauge    adapter          requests in the frozen reference
manyhats_drift_samples_total      counter  adapter, kind    requests looked at
manyhats_drift_dropped_total      counter  reason           not looked at, or not told
manyhats_drift_alarms_total       counter  adapter, signal  alarms raised
manyhats_drift_actions_total      counter  adapter, action  actions taken (``dry_run`` included)
manyhats_drift_stale              gauge    adapter          1: not validated for its period
manyhats_feedback_total           counter  adapter, label   ``positive``, ``neutral``, ``negative``
================================  =======  ===============  ===================================

All gauges are of the version that the name means now.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from manyhats.metrics.labels import LabelCap

_SIGNAL: Final = ("adapter", "signal")
_ADAPTER: Final = ("adapter",)


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

    def alarm(self, adapter: str, signal: str) -> None:
        """An alarm was raised."""
        self._alarms.labels(self._cap.label(adapter), signal).inc()

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
