"""One version watched: its reference, then a track a signal; as a canary, against stable."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from manyhats.drift.alarms import Alarm, Finding
from manyhats.drift.feedback import Feedback
from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import SIGNALS, Group, Kind, Signal, Values, Worse
from manyhats.drift.signals.hidden import HiddenReference
from manyhats.drift.track import Layout, Track, restored
from manyhats.types import AdapterRef

HIDDEN: Final = "hidden_distance"
_CANARY: Final = "canary/"
FEEDBACK_KEPT: Final = 20
"""Opinions of a version that are remembered as they were given, until the process ends."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many requests make a reference (of sampled signals: ``sampled``), how many before it are
    left out (``warm_up``: loads, cold caches), and the windows of each.
    """

    warm_up: int
    reference: int
    sampled: int
    live: Layout
    rescored: Layout
    canary: Layout

    def least(self, signal: Signal) -> int:
        """The values that a signal's reference needs."""
        return self.sampled if signal.sampled or signal.group is Group.PEOPLE else self.reference

    def layout(self, signal: Signal) -> Layout:
        """A signal's window."""
        small = signal.sampled or signal.group is Group.PEOPLE
        return self.rescored if small else self.live


def ident(ref: AdapterRef) -> str:
    """``name@digest``: replicas need not number versions alike, and two names that have the same
    content (of two tenants, say) share nothing.
    """
    return f"{ref.name}@{ref.digest}"


class References:
    """A version's references: collected, merged with other replicas', frozen one signal at a time.

    A frozen signal never changes. ``complete``: all signals that come with every request are.
    """

    def __init__(self) -> None:
        self.frozen: dict[str, SignalSketch] = {}
        self.collecting: dict[str, SignalSketch] = {}
        self.hidden = HiddenReference()

    def collect(self, name: str, value: float | str) -> None:
        """One value for a signal that is not frozen."""
        found = self.collecting.get(name)
        if found is None:
            found = self.collecting[name] = SignalSketch(SIGNALS[name], interval=True)
        found.add(value)

    def freeze(self, name: str) -> SignalSketch:
        """From now on the signal's reference is what was collected."""
        self.frozen[name] = self.collecting.pop(name)
        return self.frozen[name]

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "frozen": {name: sketch.dump() for name, sketch in self.frozen.items()},
            "collecting": {name: sketch.dump() for name, sketch in self.collecting.items()},
            "hidden": self.hidden.dump(),
        }

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> References:
        """What ``dump`` gave; signals that this server does not know are left out."""
        made = cls()
        for part, into in (("frozen", made.frozen), ("collecting", made.collecting)):
            for name, sketch in value[part].items():
                if name in SIGNALS:
                    into[name] = SignalSketch.load(SIGNALS[name], sketch)
        made.hidden = HiddenReference.load(value["hidden"])
        return made


class Watch:
    """One version. Not thread-safe: the monitor's thread alone uses it.

    ``alpha`` is the rate of this version over its life; a half of it is the canary's comparison.
    """

    def __init__(
        self, ref: AdapterRef, alpha: float, sizes: Sizes, spent: Mapping[str, Any] | None = None
    ) -> None:
        self.ref = ref
        self._alpha = alpha / 2 / len(SIGNALS)
        self._sizes = sizes
        self._spent = dict(spent or {})
        self.seen = 0
        self.order = 0
        self.hidden_kept = False
        self.references = References()
        self.tracks: dict[str, Track] = {}
        self.against_stable: dict[str, Track] = {}
        self._stable: References | None = None
        self.feedback: deque[Feedback] = deque(maxlen=FEEDBACK_KEPT)
        self._newly_frozen: list[str] = []
        self._beside = {"count": 0.0, "kl": 0.0, "agreement": 0.0}

    @property
    def ident(self) -> str:
        """Name and content: what the store and the monitor call the version."""
        return ident(self.ref)

    def compare_with(self, stable: References | None) -> None:
        """The version is a canary beside one with these references; None: it is not, or no more."""
        if stable is self._stable:
            return
        self._spent = self.spent()
        self._stable = stable
        self.against_stable.clear()

    def use(self, references: References) -> None:
        """Take over references from the store, or those of an evaluation set."""
        self.references = references
        self.tracks.clear()
        for name, sketch in references.frozen.items():
            self._track(name, sketch)

    def add(self, values: Values, at: float, request_id: str) -> list[Alarm]:
        """One request's values; the alarms that they raise."""
        alarms = []
        for name, value in values.items():
            if found := self._own(name, value, at, request_id):
                alarms.append(self._alarm(found, self.tracks[name], "reference", at))
            if found := self._beside_stable(name, value, at, request_id):
                alarms.append(self._alarm(found, self.against_stable[name], "stable", at))
        return alarms

    def hidden(self, hidden: tuple[float, ...]) -> float | None:
        """The distance of a hidden state to the mean of the version's own reference."""
        return self.references.hidden.add(hidden)

    @property
    def looks(self) -> int:
        """Looks at windows so far."""
        return sum(track.looks for track in self.tracks.values())

    @property
    def reference_size(self) -> int:
        """Requests in the largest frozen reference."""
        return max((sketch.count for sketch in self.references.frozen.values()), default=0)

    def now(self, name: str) -> float | None:
        """A signal's mean over its window; while there is none, over what is collected."""
        if track := self.tracks.get(name):
            return track.window().mean
        collected = self.references.collecting.get(name)
        return collected.mean if collected else None

    def alarmed(self, name: str) -> bool:
        """Whether a signal's alarm still stands."""
        both = (self.tracks.get(name), self.against_stable.get(name))
        return any(track is not None and track.alarmed for track in both)

    def beside(self, values: Values) -> None:
        """A canary's request compared with the stable version, teacher-forced."""
        kl, agreement = values.get("kl"), values.get("agreement")
        if isinstance(kl, float) and isinstance(agreement, float):
            self._beside["count"] += 1
            self._beside["kl"] += kl
            self._beside["agreement"] += agreement

    def beside_stable(self) -> dict[str, float] | None:
        """Means of those; None of none."""
        count = self._beside["count"]
        if not count:
            return None
        return {**{k: v / count for k, v in self._beside.items()}, "count": count}

    def begin_anew(self) -> None:
        """Empty windows and new bets over the same references; what was spent stays spent."""
        self._spent = self.spent()
        self.compare_with(None)
        self.tracks.clear()
        for name, sketch in self.references.frozen.items():
            self._track(name, sketch)

    def least(self, name: str) -> int:
        """The values that a signal's reference needs."""
        return self._sizes.least(SIGNALS[name])

    def freeze(self, name: str) -> None:
        """Freeze a signal's reference as it is, and begin to compare."""
        self._track(name, self.references.freeze(name))
        self._newly_frozen.append(name)

    def replace(self, name: str, reference: SignalSketch) -> None:
        """Take another replica's frozen reference for a signal."""
        self.references.frozen[name] = reference
        self._track(name, reference)

    def take_newly_frozen(self) -> list[str]:
        """The signals frozen since the last call."""
        taken, self._newly_frozen = self._newly_frozen, []
        return taken

    def spent(self) -> dict[str, Any]:
        """What a restart must know."""
        own = {name: dict(track.spent()) for name, track in self.tracks.items()}
        beside = {f"{_CANARY}{n}": dict(t.spent()) for n, t in self.against_stable.items()}
        return {**self._spent, **own, **beside}

    def _own(self, name: str, value: float | str, at: float, request_id: str) -> Finding | None:
        if self.seen <= self._sizes.warm_up:
            return None
        track = self.tracks.get(name)
        if track is not None:
            return track.add(value, at, request_id)
        self.references.collect(name, value)
        if self.references.collecting[name].count >= self.least(name):
            self.freeze(name)
        return None

    def _track(self, name: str, reference: SignalSketch) -> None:
        layout = self._sizes.layout(SIGNALS[name])
        spent = self._spent.get(name, {})
        self.tracks[name] = restored(reference, self._alpha, layout, spent)

    def _beside_stable(
        self, name: str, value: float | str, at: float, request_id: str
    ) -> Finding | None:
        """A canary is new: only what is worse counts, and where neither way is, nothing does."""
        signal = SIGNALS[name]
        if name == HIDDEN:  # each version's distances are to its own mean
            return None
        if self._stable is None or signal.worse is Worse.EITHER or signal.kind is Kind.CATEGORY:
            return None
        track = self.against_stable.get(name)
        if track is None:
            reference = self._stable.frozen.get(name)
            if reference is None:
                return None
            spent = self._spent.get(f"{_CANARY}{name}", {})
            track = restored(reference, self._alpha, self._sizes.canary, spent, one_sided=True)
            self.against_stable[name] = track
        return track.add(value, at, request_id)

    def _alarm(self, found: Finding, track: Track, against: str, at: float) -> Alarm:
        ref = self.ref
        return Alarm(ref.name, ref.version, ref.digest, against, found, at, track.examples())
