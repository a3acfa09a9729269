"""The reference out of the evaluation set: the signals of the pairs that a version was judged on.

What it was to answer, scored by it and by the base; so it is the wanted answers' side, where the
live reference is what the version says itself. The two differ without anything being wrong, so no
alarm is raised by this one: it shows at once, before the first live request, what the version was
meant for, and later how far what comes is from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from manyhats.drift.archive import Archive
from manyhats.drift.detectors import windows
from manyhats.drift.reference import SignalSketch
from manyhats.drift.rescoring import rescored
from manyhats.drift.signals import SIGNALS, Values
from manyhats.drift.signals.finished import Ending, Finished
from manyhats.drift.signals.output import output_signals
from manyhats.drift.signals.prompt import prompt_signals
from manyhats.drift.signals.rescored import rescored_signals
from manyhats.drift.watch import ident
from manyhats.lifecycle.evaluation.run import Plan, ScoredPair
from manyhats.lifecycle.records import Entry
from manyhats.types import TenantId

_GIVEN: Final = frozenset({"finish_reason"})
"""Signals that say nothing of an answer that was given."""

Decode = Callable[[tuple[int, ...]], str]


class Owned(Protocol):
    """The names as their owners see them (``lifecycle.service.AdapterService``)."""

    def entry(self, name: str, tenant: TenantId) -> Entry:
        """Raises ModelNotFoundError."""


class EvaluationReferences:
    """Told of each evaluation. Blocks on the store."""

    def __init__(self, archive: Archive, names: Owned, decode: Decode) -> None:
        self._archive = archive
        self._names = names
        self._decode = decode

    def take(self, plan: Plan, pairs: Sequence[ScoredPair]) -> None:
        """Keep the reference of an evaluation's own pairs. The first one that ended once requests
        are routed to the version stays; until then each replaces the one before.

        Raises ModelNotFoundError (deleted meanwhile), ServiceError.
        """
        if not pairs:
            return
        ref = plan.candidate
        made: dict[str, SignalSketch] = {}
        for pair in pairs:
            for name, value in self._values(plan, pair).items():
                made.setdefault(name, SignalSketch(SIGNALS[name])).add(value)
        routed = self._names.entry(ref.name, plan.tenant).route.holds(ref.version)
        self._archive.keep_evaluation(ident(ref), made, replace=not routed)

    def _values(self, plan: Plan, pair: ScoredPair) -> Values:
        prompt, answer = pair.token_ids[: pair.start], pair.token_ids[pair.start :]
        done = Finished(
            "evaluation",
            plan.tenant,
            plan.candidate,
            prompt,
            answer,
            self._decode(answer),
            Ending.STOP,
        )
        scored = rescored(pair.lanes[0], pair.lanes[-1], 0)
        values: Values = {
            **output_signals(done),
            **prompt_signals(done, self._decode(prompt)),
            **rescored_signals(scored),
        }
        return {name: value for name, value in values.items() if name not in _GIVEN}


def compared(evaluation: SignalSketch, now: SignalSketch) -> Mapping[str, Any]:
    """How far what comes ``now`` is from the evaluation set: KS distance or G statistic, a bound of
    its p-value (its natural logarithm) and the PSI, as in ``track``; empty of nothing.
    """
    if not evaluation.count or not now.count:
        return {}
    if evaluation.numbers and now.numbers:
        distance = windows.ks_distance(evaluation.numbers, now.numbers)
        error = evaluation.numbers.rank_error + now.numbers.rank_error
        log_p = windows.ks_log_p(distance, error, evaluation.count, now.count)
        psi = windows.psi_of_numbers(evaluation.numbers, now.numbers)
        return {"statistic": distance, "log_p": log_p, "psi": psi}
    known, seen = evaluation.categories, now.categories
    return {
        "statistic": windows.g_statistic(known, seen),
        "log_p": windows.fisher_log_p(known, seen),
        "psi": windows.psi_of_counts(known, seen),
    }
