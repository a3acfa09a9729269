"""Evaluations at rest, in the registry: what an adapter is asked and judged by goes with the name,
a verdict with its version, and what is long (pairs, rules, whole reports) beside the documents.

So every server of a shared registry has them, a backup too, and a change is in the audit log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.evaluation.gate import Thresholds
from manyhats.lifecycle.evaluation.probes import Pair, Rule, read_pairs, read_rules
from manyhats.lifecycle.records import Entry
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.states import Demands, Require, Verdict
from manyhats.lifecycle.texts import DATA, RULES, text_key
from manyhats.types import AdapterRef


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What one name is asked and judged by."""

    data: tuple[Pair, ...] = ()
    rules: tuple[Rule, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    require: Require = Require.NONE


class EvaluationStore:
    """The evaluations in ``registry``. Every call may block on its store, and raises ServiceError
    where that fails, ModelNotFoundError where the name or the version is gone.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def settings(self, entry: Entry) -> EvaluationSettings:
        """Those of a name; the defaults where nothing was said."""
        return EvaluationSettings(
            data=read_pairs(self._registry.text(entry.name, DATA) or ""),
            rules=read_rules(self._registry.text(entry.name, RULES) or ""),
            thresholds=Thresholds.model_validate(dict(entry.demands.thresholds)),
            require=entry.demands.require,
        )

    def write(
        self,
        name: str,
        cause: Cause,
        *,
        data: str | None,
        rules: str | None,
        thresholds: Thresholds | None,
        require: Require | None,
    ) -> EvaluationSettings:
        """Replace what is given; None leaves what is there, an empty text removes it."""

        def update(demands: Demands) -> Demands:
            said = None if thresholds is None else thresholds.model_dump(exclude_unset=True)
            return Demands(demands.thresholds if said is None else said, require or demands.require)

        given = {DATA: data, RULES: rules}
        texts = {text_key(name, k): text or None for k, text in given.items() if text is not None}
        return self.settings(self._registry.change_demands(name, cause, update, texts))

    def verdicts(self) -> Iterator[tuple[str, Verdict]]:
        """The newest verdict of each name, of one second the newest version's."""
        for entry in self._registry.entries():
            found = [record.verdict for record in reversed(entry.versions) if record.verdict]
            if found:
                yield entry.name, max(found, key=lambda verdict: verdict.at)

    def report(self, name: str, version: int) -> dict[str, Any] | None:
        """A version's last report."""
        kept = self._registry.text(name, version)
        return None if kept is None else dict(orjson.loads(kept))

    def keep(
        self, ref: AdapterRef, cause: Cause, verdict: Verdict, report: Mapping[str, Any]
    ) -> None:
        """Make this the version's last verdict, and its report, in one change."""
        texts = {text_key(ref.name, ref.version): orjson.dumps(report).decode()}
        self._registry.change_version(
            ref.name,
            ref.version,
            "evaluate",
            cause,
            lambda entry, record: record.judged(verdict),
            texts,
        )
