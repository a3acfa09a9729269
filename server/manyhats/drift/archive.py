"""Watches and alarms in the store: opened, frozen, saved; references merged across replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import orjson

from manyhats.drift.alarms import Alarm
from manyhats.drift.detectors.spending import share
from manyhats.drift.reference import SignalSketch
from manyhats.drift.signals import SIGNALS
from manyhats.drift.signals.hidden import FITTED, HiddenReference
from manyhats.drift.store import DriftStore
from manyhats.drift.watch import References, Sizes, Watch, ident
from manyhats.types import AdapterRef

_PARTIAL: Final = "reference"
FRESH_S: Final = 300.0
"""A replica's windows count for others for so long after it has put them there."""


class Archive:
    """What outlives the process. ``replica``: this one's id in the store, None where no other
    shares it. Every call blocks on the disk or the network and raises ServiceError where that
    fails.
    """

    def __init__(
        self,
        store: DriftStore,
        replica: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._shared = replica is not None
        self._replica = replica or "here"
        self._clock = clock

    def open(self, ref: AdapterRef, alpha: float, sizes: Sizes) -> Watch:
        """The watch on a version as it was left, or a new one.

        Version number i that is ever watched gets ``alpha * share(i)``: the rate of all versions
        together is at most ``alpha``.
        """
        kept = self._read(f"spent/{ident(ref)}")
        order = kept["order"] if kept else len(self._store.items("spent/")) + 1
        watch = Watch(ref, alpha * share(order), sizes, kept["tracks"] if kept else None)
        watch.order = order
        references = References()
        if partial := self._read(f"{_PARTIAL}/{ident(ref)}/{self._replica}"):
            references = References.load(partial)
            watch.seen = int(partial["seen"])
        if hidden := self._read(f"hidden/{ident(ref)}"):
            references.hidden = HiddenReference.load(hidden)
        for key, text in self._store.items(f"frozen/{ident(ref)}/").items():
            name = key.rsplit("/", 1)[1]
            if name in SIGNALS:
                references.frozen[name] = SignalSketch.load(SIGNALS[name], orjson.loads(text))
                references.collecting.pop(name, None)
        watch.use(references)
        if not kept:
            self._save_spent(watch)
        return watch

    def frozen(self, watch: Watch) -> None:
        """Keep what ``watch`` has just frozen. Where another replica was first, its reference is
        taken instead.
        """
        for name in watch.take_newly_frozen():
            key = f"frozen/{watch.ident}/{name}"
            ours = _text(watch.references.frozen[name].dump())
            kept = self._store.put_new(key, ours)
            if kept != ours:
                watch.replace(name, SignalSketch.load(SIGNALS[name], orjson.loads(kept)))
        hidden = watch.references.hidden
        if hidden.count == FITTED and not watch.hidden_kept:
            kept = self._store.put_new(f"hidden/{watch.ident}", _text(hidden.dump()))
            watch.references.hidden = HiddenReference.load(orjson.loads(kept))
            watch.hidden_kept = True

    def save(self, watch: Watch) -> None:
        """Keep what is being collected and what was spent; freeze what replicas have together, and
        let them see the windows.
        """
        version = watch.ident
        if self._shared:
            self._follow(watch)
            self._publish(watch)
        ours = f"{_PARTIAL}/{version}/{self._replica}"
        references = watch.references
        if not references.collecting and references.hidden.count in (0, FITTED):
            self._store.remove(ours)
        else:
            partial = {**references.dump(), "frozen": {}, "seen": watch.seen}
            self._store.put(ours, _text(partial))
            self._merge_others(watch, ours)
        self._save_spent(watch)

    def forget(self, watch: Watch) -> None:
        """Remove a version's references, so that they are collected anew."""
        version = watch.ident
        kinds = ("frozen", _PARTIAL, "window")
        for prefix in (*(f"{kind}/{version}/" for kind in kinds), f"hidden/{version}"):
            for key in self._store.items(prefix):
                self._store.remove(key)

    def windows(self, watch: Watch) -> tuple[int, dict[str, SignalSketch]]:
        """(replicas, the live windows of all of them merged): this one's as it is now, others' as
        they were when they last saved.
        """
        merged = {name: track.window() for name, track in watch.tracks.items()}
        replicas = 1
        others = self._store.items(f"window/{watch.ident}/") if self._shared else {}
        for key, text in others.items():
            kept = orjson.loads(text)
            if key.endswith(f"/{self._replica}") or self._clock() > kept["at"] + FRESH_S:
                continue
            replicas += 1
            for name, value in kept["signals"].items():
                if name in SIGNALS:
                    sketch = SignalSketch.load(SIGNALS[name], value)
                    merged.setdefault(name, SignalSketch(SIGNALS[name])).merge(sketch)
        return replicas, merged

    def keep_evaluation(
        self, version: str, sketches: Mapping[str, SignalSketch], *, replace: bool
    ) -> None:
        """The reference of a version's evaluation set; the one that is there stays, or not."""
        text = _text({name: sketch.dump() for name, sketch in sketches.items()})
        if replace:
            self._store.put(f"evaluation/{version}", text)
        else:
            self._store.put_new(f"evaluation/{version}", text)

    def evaluation(self, version: str) -> dict[str, SignalSketch]:
        """See ``keep_evaluation``; empty of none."""
        kept = self._read(f"evaluation/{version}") or {}
        return {
            n: SignalSketch.load(SIGNALS[n], value) for n, value in kept.items() if n in SIGNALS
        }

    def alarms(self, scope: str) -> list[Alarm]:
        """The latest alarms of a name (``store.scope``)."""
        return [Alarm.load(value) for value in self._read(f"alarms/{scope}") or ()]

    def keep_alarms(self, scope: str, alarms: Iterable[Alarm]) -> None:
        """Keep them."""
        self._store.put(f"alarms/{scope}", _text([alarm.shown() for alarm in alarms]))

    def _publish(self, watch: Watch) -> None:
        prefix, now = f"window/{watch.ident}/", self._clock()
        for key, text in self._store.items(prefix).items():
            if now > orjson.loads(text)["at"] + FRESH_S:  # a replica that is gone
                self._store.remove(key)
        windows = {name: track.window() for name, track in watch.tracks.items()}
        shown = {name: window.dump() for name, window in windows.items() if window.count}
        if shown:
            self._store.put(prefix + self._replica, _text({"at": now, "signals": shown}))

    def _follow(self, watch: Watch) -> None:
        """What other replicas have done to the references: frozen some, or all begun anew."""
        version, references = watch.ident, watch.references
        texts = self._store.items(f"frozen/{version}/")
        if references.frozen and not texts:
            watch.use(References())
            watch.hidden_kept = False
            self._store.remove(f"{_PARTIAL}/{version}/{self._replica}")
            return
        for key, text in texts.items():
            name = key.rsplit("/", 1)[1]
            if name in SIGNALS and name not in references.frozen:
                references.collecting.pop(name, None)
                watch.replace(name, SignalSketch.load(SIGNALS[name], orjson.loads(text)))
        if not watch.hidden_kept and (hidden := self._read(f"hidden/{version}")):
            references.hidden = HiddenReference.load(hidden)
            watch.hidden_kept = True

    def _merge_others(self, watch: Watch, ours: str) -> None:
        """Freeze each signal of which all replicas together have enough."""
        texts = self._store.items(f"{_PARTIAL}/{watch.ident}/")
        others = [References.load(orjson.loads(text)) for key, text in texts.items() if key != ours]
        if not others:
            return
        for name in list(watch.references.collecting):
            have = [r.collecting[name] for r in others if name in r.collecting]
            total = watch.references.collecting[name].count + sum(s.count for s in have)
            if total >= watch.least(name):
                for sketch in have:
                    watch.references.collecting[name].merge(sketch)
                watch.freeze(name)
        self.frozen(watch)

    def _save_spent(self, watch: Watch) -> None:
        kept = {"order": watch.order, "tracks": watch.spent()}
        self._store.put(f"spent/{watch.ident}", _text(kept))

    def _read(self, key: str) -> Any:
        text = self._store.get(key)
        return None if text is None else orjson.loads(text)


def _text(value: Any) -> str:
    return orjson.dumps(value).decode()
