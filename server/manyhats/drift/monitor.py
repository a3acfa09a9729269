"""The monitor: is told of finished requests, keeps a watch on each version, raises alarms, acts.

All of it happens on a thread of its own. The API's side costs one look at a hash and one entry in a
bounded queue; what finds no room there is dropped and counted, never waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from manyhats.drift.actions import Actor
from manyhats.drift.alarms import Alarm
from manyhats.drift.archive import Archive
from manyhats.drift.feedback import Answered, Feedback, RecentRequests, label_of
from manyhats.drift.rescoring import Sample, is_sampled
from manyhats.drift.signals import Values
from manyhats.drift.signals.finished import Finished
from manyhats.drift.signals.output import output_signals
from manyhats.drift.signals.prompt import prompt_signals
from manyhats.drift.signals.rescored import Rescored, rescored_signals
from manyhats.drift.signals.service import service_signals
from manyhats.drift.store import scope
from manyhats.drift.validation import Validations, warnings
from manyhats.drift.watch import HIDDEN, References, Sizes, Watch, ident
from manyhats.drift.worker import Worker
from manyhats.errors import ModelNotFoundError
from manyhats.lifecycle.records import Entry
from manyhats.lifecycle.routes import Route
from manyhats.metrics import DriftMetrics
from manyhats.types import AdapterRef, TenantId

logger = logging.getLogger(__name__)

ALARMS_KEPT: Final = 50
"""Alarms of a name that are remembered."""


class Names(Protocol):
    """The names as the monitor looks them up (``lifecycle.service.AdapterService``)."""

    def visible(self, name: str, tenant: TenantId) -> Entry:
        """A name that the tenant may use. Raises ModelNotFoundError."""


@dataclass(frozen=True, slots=True)
class Options:
    """``share`` of the requests that is rescored (``canary_share`` of a canary's); ``queue`` and
    ``versions`` bound what waits and what is watched; ``tick_s``: how often the thread looks after
    what stands open, ``save_s`` how often it saves.
    """

    sizes: Sizes
    share: float
    canary_share: float
    alpha: float
    queue: int = 4096
    versions: int = 256
    remembered: int = 100_000
    tick_s: float = 1.0
    save_s: float = 60.0


@dataclass(slots=True)
class _Standing:
    """An alarm that is still so: looked at again at each tick, in case it may be acted on then."""

    alarm: Alarm
    tenant: TenantId


class DriftMonitor:
    """See the module. ``decode`` turns tokens into text; ``offer`` takes samples to rescore."""

    def __init__(
        self,
        names: Names,
        actor: Actor,
        archive: Archive,
        validations: Validations,
        metrics: DriftMetrics,
        options: Options,
        *,
        decode: Callable[[tuple[int, ...]], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.names = names
        self.actor = actor
        self.archive = archive
        self.validations = validations
        self.metrics = metrics
        self.options = options
        self.recent = RecentRequests(options.remembered)
        self.offer: Callable[[Sample], None] | None = None
        self.lock = threading.RLock()
        self.alarms: dict[str, deque[Alarm]] = {}
        self._decode = decode
        self.clock = clock
        self._watches: OrderedDict[str, Watch] = OrderedDict()
        self._standing: dict[tuple[str, str, str], _Standing] = {}
        self._names: dict[str, TenantId] = {}
        self._warned: set[str] = set()
        self._routes: dict[str, tuple[Route, TenantId]] = {}
        self._saved_at = clock()
        self._worker = Worker(
            self.lock,
            self._tick,
            metrics.dropped,
            size=options.queue,
            tick_s=options.tick_s,
            clock=clock,
        )

    def start(self) -> None:
        """Begin to look at what comes."""
        self._worker.start()

    def stop(self) -> None:
        """Look at what has come, save, and end."""
        self._worker.stop(self._save)
        self._watches.clear()  # the sketches' library complains of those that outlive it

    def finished(self, done: Finished) -> None:
        """A choice has ended. On the event loop; never blocks."""
        self.recent.remember(done.request_id, Answered(done.tenant, done.adapter))
        if not done.adapter.version:  # a composition that a request named: nobody's version
            return
        self._worker.post(lambda: self._look_at(done))
        stable = self._stable_beside(done.adapter, done.tenant)
        if self.offer is not None and self._is_sampled(done.request_id, stable):
            self.offer(Sample(done, stable))

    def samples(self, request_id: str, tenant: TenantId, ref: AdapterRef) -> bool:
        """Whether a request that begins now will be scored again, as far as is known yet."""
        if self.offer is None or not ref.version:
            return False
        return self._is_sampled(request_id, self._stable_beside(ref, tenant))

    def rescored(self, sample: Sample, base: Rescored, stable: Rescored | None) -> None:
        """A sample was scored again. Any thread; never blocks."""
        self._worker.post(lambda: self._look_at_rescored(sample.done, base, stable))

    def feedback(self, tenant: TenantId, said: Feedback) -> AdapterRef | None:
        """A tenant's opinion of an answer; the version that it was of, None: the base.

        Raises NotFoundError: not one of the tenant's latest requests.
        """
        answered = self.recent.find(said.request_id, tenant)
        ref = answered.adapter
        self.metrics.feedback(None if ref is None else ref.label, label_of(said.score))
        if ref is not None and ref.version:
            self._worker.post(lambda: self._hear(ref, tenant, said))
        return ref

    def dropped(self, reason: str) -> None:
        """Something was not looked at."""
        self.metrics.dropped(reason)

    def watch(self, ref: AdapterRef) -> Watch:
        """The watch on a version, begun where there is none. Hold ``lock``. Raises ServiceError."""
        key = ident(ref)
        found = self._watches.get(key)
        if found is None:
            found = self.archive.open(ref, self.options.alpha, self.options.sizes)
            self._watches[key] = found
            while len(self._watches) > self.options.versions:
                _, gone = self._watches.popitem(last=False)
                self.archive.save(gone)
        self._watches.move_to_end(key)
        return found

    def forget(self, ref: AdapterRef) -> None:
        """Collect a version's reference anew. Blocks; raises ServiceError."""
        with self.lock:
            watch = self.watch(ref)
            self.archive.forget(watch)
            watch.use(References())
            watch.hidden_kept = False
            self.metrics.reference(ref.label, 0)

    def settle(self) -> None:
        """Wait until everything that was told so far has been looked at, and acted on."""
        self._worker.settle()

    def past_alarms(self, entry: Entry) -> deque[Alarm]:
        """The latest alarms of a name, oldest first. Hold ``lock``."""
        key = scope(entry)
        kept = self.alarms.get(key)
        if kept is None:
            kept = self.alarms[key] = deque(self.archive.alarms(key), maxlen=ALARMS_KEPT)
        return kept

    def _look_at(self, done: Finished) -> None:
        ref = done.adapter
        watch = self.watch(ref)
        watch.seen += 1
        self.metrics.sampled(ref.label, "finished")
        text = self._decode(done.prompt_token_ids)
        values: Values = {
            **output_signals(done),
            **prompt_signals(done, text),
            **service_signals(done),
        }
        self._take(ref, done.tenant, values, done.request_id)

    def _look_at_rescored(self, done: Finished, base: Rescored, stable: Rescored | None) -> None:
        ref = done.adapter
        watch = self.watch(ref)
        self.metrics.sampled(ref.label, "rescored" if stable is None else "canary")
        values = dict(rescored_signals(base))
        distance = watch.hidden(tuple(base.hidden))
        if distance is not None:
            values[HIDDEN] = distance
        if stable is not None:
            watch.beside(rescored_signals(stable))
        self._take(ref, done.tenant, values, done.request_id)
        kl, agreement = watch.now("kl"), watch.now("agreement")
        if kl is not None and agreement is not None and self._is_stable(ref):
            self.metrics.against_base(ref.label, kl=kl, agreement=agreement)

    def _hear(self, ref: AdapterRef, tenant: TenantId, said: Feedback) -> None:
        self.watch(ref).feedback.append(said)
        self._take(ref, tenant, {"feedback_score": said.score}, said.request_id)

    def _take(self, ref: AdapterRef, tenant: TenantId, values: Values, request_id: str) -> None:
        watch = self.watch(ref)
        entry = self._entry(ref.name, tenant)
        stable = None if entry is None else self._stable_of(entry, ref)
        watch.compare_with(None if stable is None else self.watch(stable).references)
        looks = watch.looks
        alarms = watch.add(values, self.clock(), request_id)
        self.archive.frozen(watch)
        if entry is not None:
            self._names[ref.name] = tenant
        if watch.looks != looks and self._is_stable(ref):
            self._publish(watch)
        for alarm in alarms:
            self._raised(alarm, entry, tenant)

    def _raised(self, alarm: Alarm, entry: Entry | None, tenant: TenantId) -> None:
        name, signal = alarm.name, alarm.finding.signal
        self.metrics.alarm(name, signal, next(iter(alarm.examples), ""))
        if entry is None:
            return
        kept = self.past_alarms(entry)
        kept.append(alarm)
        self.archive.keep_alarms(scope(entry), kept)
        self._standing[name, f"{name}@{alarm.digest}", signal] = _Standing(alarm, tenant)
        self._routes.setdefault(name, (entry.route, tenant))
        self.actor.act(entry, alarm)
        self._follow(name, tenant)

    def _tick(self) -> None:
        """What stands open: routes that somebody has moved, alarms that may be acted on now."""
        for name, (route, tenant) in list(self._routes.items()):
            entry = self._entry(name, tenant)
            if entry is None or entry.route != route:
                self._moved(name, entry)
        for key, standing in list(self._standing.items()):
            watch = self._watches.get(key[1])
            entry = self._entry(key[0], standing.tenant)
            if entry is None or watch is None or not watch.alarmed(key[2]):
                del self._standing[key]
                continue
            self.actor.act(entry, standing.alarm, tell=False)
            self._follow(key[0], standing.tenant)
        if self.clock() >= self._saved_at + self.options.save_s:
            self._save()

    def _moved(self, name: str, entry: Entry | None) -> None:
        """Somebody has moved the route: what was seen before says nothing of it any more."""
        self._routes.pop(name)
        for key in [key for key in self._standing if key[0] == name]:
            del self._standing[key]
        for record in entry.versions if entry else ():
            if watch := self._watches.get(ident(record.ref)):
                watch.begin_anew()

    def _follow(self, name: str, tenant: TenantId) -> None:
        """Remember the route as it is after an action of our own."""
        entry = self._entry(name, tenant)
        if entry is not None:
            self._routes[name] = (entry.route, tenant)

    def _is_stable(self, ref: AdapterRef) -> bool:
        """Whether the gauges of a name, which tell of one version, are this version's."""
        entry = self._entry(ref.name, self._names[ref.name]) if ref.name in self._names else None
        return entry is not None and entry.route.stable == ref.version

    def _publish(self, watch: Watch) -> None:
        label = watch.ref.label
        self.metrics.reference(label, watch.reference_size)
        for name, track in watch.tracks.items():
            if (found := track.finding) is None:
                continue
            ks = found.statistic if track.reference.numbers else None
            self.metrics.scored(label, name, found.score)
            self.metrics.compared(label, name, psi=found.psi, ks=ks)
            self.metrics.e_value(label, name, found.log_e)

    def _save(self) -> None:
        self._saved_at = self.clock()
        for watch in self._watches.values():
            self.archive.save(watch)
        for name, tenant in list(self._names.items()):
            entry = self._entry(name, tenant)
            if entry is None:
                del self._names[name]
            else:
                self._look_at_age(entry)

    def _look_at_age(self, entry: Entry) -> None:
        """Whether the stable version's validation is too old, and whether it retires soon."""
        policy = self.actor.policy(entry)
        self.metrics.stale(entry.name, self.validations.is_stale(entry, policy))
        for text in warnings(entry, policy, self.clock()):
            ident = f"{entry.name}@{entry.route.stable}"
            if ident not in self._warned and len(self._warned) < self.options.versions:
                self._warned.add(ident)
                logger.warning("drift: %s", text)

    def _entry(self, name: str, tenant: TenantId) -> Entry | None:
        try:
            return self.names.visible(name, tenant)
        except ModelNotFoundError:
            return None

    def _is_sampled(self, request_id: str, stable: AdapterRef | None) -> bool:
        share = self.options.share if stable is None else self.options.canary_share
        return is_sampled(request_id, share)

    def _stable_beside(self, ref: AdapterRef, tenant: TenantId) -> AdapterRef | None:
        entry = self._entry(ref.name, tenant)
        return None if entry is None else self._stable_of(entry, ref)

    @staticmethod
    def _stable_of(entry: Entry, ref: AdapterRef) -> AdapterRef | None:
        """The stable version, where ``ref`` is the canary beside it; None otherwise."""
        canary = entry.route.canary
        if canary is None or canary.version != ref.version:
            return None
        stable = entry.find(entry.route.stable)
        return None if stable is None else stable.ref
