"""What is known of a name's drift, as JSON: for the admin API, and through it for the command."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from manyhats.drift.evaluated import compared
from manyhats.drift.monitor import DriftMonitor
from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import SIGNALS
from manyhats.drift.track import Track
from manyhats.drift.validation import Validations
from manyhats.drift.watch import Watch
from manyhats.lifecycle.records import AdapterRecord, Entry

_QUANTILES: Final = 9


def report(monitor: DriftMonitor, validations: Validations, entry: Entry) -> dict[str, Any]:
    """The versions that requests are routed to: each signal now against its reference; the latest
    alarms, the policy, what the automation has done. Raises ServiceError.
    """
    routed = [r for r in entry.versions if entry.route.holds(r.ref.version)]
    policy, latch = monitor.actor.policy(entry), monitor.actor.latch(entry)
    latched = latch is not None and latch.route == entry.route.shown()
    with monitor.lock:
        return {
            "name": entry.name,
            "route": entry.route.shown(),
            "policy": policy.shown(),
            "latch": None if latch is None else {**latch.shown(), "holds": latched},
            "versions": [_version(monitor, record, entry) for record in routed],
            "alarms": [alarm.shown() for alarm in monitor.past_alarms(entry)],
            "validation": validations.shown(entry, policy),
        }


def _version(monitor: DriftMonitor, record: AdapterRecord, entry: Entry) -> dict[str, Any]:
    watch = monitor.watch(record.ref)
    canary = entry.route.canary
    role = "canary" if canary and canary.version == record.ref.version else "stable"
    replicas, windows = monitor.archive.windows(watch)
    seen = _Seen(watch, replicas, windows, monitor.archive.evaluation(watch.ident))
    return {
        "version": record.ref.version,
        "digest": record.ref.digest,
        "role": role,
        "requests": watch.seen,
        "replicas": replicas,
        "signals": {name: seen.signal(name) for name in SIGNALS if seen.knows(name)},
        "against_stable": {name: _tested(track) for name, track in watch.against_stable.items()},
        "beside_stable": watch.beside_stable(),
        "feedback": [asdict(said) for said in watch.feedback],
    }


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of a version: ``windows`` of all ``replicas`` merged, and ``evaluation``: the
    reference of its evaluation set.
    """

    watch: Watch
    replicas: int
    windows: Mapping[str, SignalSketch]
    evaluation: Mapping[str, SignalSketch]

    def knows(self, name: str) -> bool:
        """Whether there is anything to show of a signal."""
        collecting = self.watch.references.collecting
        return name in self.watch.tracks or name in collecting or name in self.evaluation

    def signal(self, name: str) -> dict[str, Any]:
        """One signal."""
        signal = SIGNALS[name]
        track = self.watch.tracks.get(name)
        collecting = self.watch.references.collecting.get(name, SignalSketch(signal))
        shown: dict[str, Any] = {"group": signal.group.value, "kind": signal.kind.value}
        if track is not None:
            shown |= {"state": "alarm" if track.alarmed else "watched", **_tested(track)}
        else:
            needs = self.watch.least(name)
            shown |= {"state": "collecting", "needs": needs, "reference": _sketch(collecting)}
        now = self.windows.get(name, collecting)
        if track is not None and self.replicas > 1:
            shown["fleet"] = {"window": _sketch(now), **compared(track.reference, now)}
        if (known := self.evaluation.get(name)) is not None:
            now = now if now.count else track.reference if track else collecting
            shown["evaluation"] = {"reference": _sketch(known), **compared(known, now)}
        return shown


def _tested(track: Track) -> dict[str, Any]:
    found = track.finding
    return {
        "reference": _sketch(track.reference),
        "window": _sketch(track.window()),
        "looks": track.looks,
        "score": found.score if found else None,
        "statistic": found.statistic if found else None,
        "log_p": found.log_p if found else None,
        "log_e": found.log_e if found else None,
        "alpha": found.alpha if found else None,
        "psi": found.psi if found else None,
        "psi_threshold": found.psi_threshold if found else None,
        "since": _moment(found.since) if found and found.score >= 1 else None,
        "examples": list(track.examples()) if track.alarmed else [],
    }


def _sketch(sketch: SignalSketch) -> dict[str, Any]:
    mean = sketch.mean
    shown: dict[str, Any] = {"count": sketch.count, "mean": None if mean is None else mean}
    if sketch.numbers:
        shown["quantiles"] = [q for q in sketch.numbers.quantiles(_QUANTILES) if math.isfinite(q)]
    else:
        shown["counts"] = dict(sketch.categories)
    return shown


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
