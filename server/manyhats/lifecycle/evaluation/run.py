"""One evaluation: every probe through the engine at background priority, then the figures.

The lanes are the candidate, the stable version where that is another one, and the base; each
completion is scored by all of them in one comparison (``EngineClient.compare``). Only rules need
the candidate to generate.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from manyhats.engine.interface import CompareRequest, EngineClient, LaneScores
from manyhats.errors import QueueFullError, RequestError
from manyhats.lifecycle.evaluation import perturb
from manyhats.lifecycle.evaluation.measures import (
    Tally,
    calibration_error,
    finite,
    mean,
    stability,
)
from manyhats.lifecycle.evaluation.probes import Pair, Rule, prompt_tokens, tokens_of
from manyhats.types import (
    AdapterRef,
    GenerationRequest,
    Priority,
    SamplingParams,
    TenantId,
)

_AT_ONCE: Final = 4
"""Probes in the engine at once."""

_AGAIN_S: Final = 0.5
"""Until a probe is tried again that found the queue of background work full."""

_SHOWN: Final = 20
"""Broken rules that are kept with a report."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. ``stable``: the version to compare with, None where there is none."""

    tenant: TenantId
    candidate: AdapterRef
    stable: AdapterRef | None
    own: tuple[Pair, ...]
    general: tuple[Pair, ...]
    rules: tuple[Rule, ...]

    @property
    def lanes(self) -> tuple[AdapterRef | None, ...]:
        """Candidate first, base last."""
        return (self.candidate, *((self.stable,) if self.stable else ()), None)

    @property
    def names(self) -> tuple[str, ...]:
        """The lanes by name."""
        return ("candidate", *(("stable",) if self.stable else ()), "base")

    @property
    def probes(self) -> int:
        """Calls of the engine in all."""
        return len(self.own) + 3 * len(self.general) + len(self.rules)


@dataclass(slots=True)
class Progress:
    """How far an evaluation is: probes done, of all."""

    total: int
    done: int = 0


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """One of the name's own pairs: prompt and completion, which begins at ``start``, and what each
    lane of the plan says of the completion.
    """

    token_ids: tuple[int, ...]
    start: int
    lanes: tuple[LaneScores, ...]


@dataclass(slots=True)
class Measured:
    """``values`` by measure; ``lanes``: the figures behind them; ``broken``: rules by index;
    ``pairs``: the name's own, in any order.
    """

    values: dict[str, float]
    lanes: dict[str, dict[str, Any]]
    rules: dict[str, Any] | None
    pairs: list[ScoredPair]


@dataclass(slots=True)
class _Lane:
    """One version's tallies. ``stable_tops``: robustness of each perturbed probe."""

    own: Tally = field(default_factory=Tally)
    general: Tally = field(default_factory=Tally)
    robustness: list[float] = field(default_factory=list)

    @property
    def calibration(self) -> float:
        return calibration_error(
            [*self.own.confidences, *self.general.confidences],
            [*self.own.correct, *self.general.correct],
        )

    def shown(self) -> dict[str, Any]:
        return {
            "own": self.own.shown(),
            "general": self.general.shown(),
            "calibration_error": finite(self.calibration),
            "robustness": finite(mean(self.robustness)),
        }


async def measure(engine: EngineClient, plan: Plan, progress: Progress) -> Measured:
    """Every probe of the plan. Raises what ``EngineClient.compare`` and ``generate`` raise."""
    lanes = [_Lane() for _ in plan.lanes]
    broken: dict[int, str] = {}
    pairs: list[ScoredPair] = []
    limit = asyncio.Semaphore(_AT_ONCE)

    async def run(work: Callable[[], Awaitable[None]]) -> None:
        async with limit:
            await work()

    async with asyncio.TaskGroup() as group:
        for index, pair in enumerate(plan.own):
            group.create_task(run(partial(_own, engine, plan, pair, index, lanes, pairs, progress)))
        for index, pair in enumerate(plan.general):
            group.create_task(run(partial(_general, engine, plan, pair, index, lanes, progress)))
        for index, rule in enumerate(plan.rules):
            group.create_task(run(partial(_rule, engine, plan, rule, index, broken, progress)))
    return Measured(
        values=_values(plan, lanes, broken),
        lanes={name: lane.shown() for name, lane in zip(plan.names, lanes, strict=True)},
        rules=_rules_shown(plan, broken) if plan.rules else None,
        pairs=pairs,
    )


async def _own(
    engine: EngineClient,
    plan: Plan,
    pair: Pair,
    index: int,
    lanes: Sequence[_Lane],
    pairs: list[ScoredPair],
    progress: Progress,
) -> None:
    scored = await _compared(engine, plan, pair, f"data: pair {index + 1}")
    for lane, of in zip(lanes, scored.lanes, strict=True):
        lane.own.add(of, scored.token_ids[scored.start :])
    pairs.append(scored)
    progress.done += 1


async def _general(
    engine: EngineClient,
    plan: Plan,
    pair: Pair,
    index: int,
    lanes: Sequence[_Lane],
    progress: Progress,
) -> None:
    where = f"general: pair {index + 1}"
    scored = await _compared(engine, plan, pair, where)
    for lane, of in zip(lanes, scored.lanes, strict=True):
        lane.general.add(of, scored.token_ids[scored.start :])
    progress.done += 1
    for change in (perturb.with_typos, perturb.with_case):
        other = pair.model_copy(update={"prompt": change(pair.prompt or "", index)})
        perturbed = await _compared(engine, plan, other, where)
        for lane, plain, of in zip(lanes, scored.lanes, perturbed.lanes, strict=True):
            lane.robustness.append(stability(plain.top_ids, of.top_ids))
        progress.done += 1


async def _rule(
    engine: EngineClient,
    plan: Plan,
    rule: Rule,
    index: int,
    broken: dict[int, str],
    progress: Progress,
) -> None:
    ids = await asyncio.to_thread(prompt_tokens, rule, engine.tokenizer)
    request = GenerationRequest(
        request_id=f"evaluate-{uuid.uuid4().hex}",
        tenant=plan.tenant,
        prompt_token_ids=tuple(ids),
        params=(SamplingParams(max_tokens=rule.max_tokens, seed=0, temperature=0.0),),
        adapter=plan.candidate,
        arrival=time.monotonic(),
        priority=Priority.BACKGROUND,
    )

    async def generate() -> str:
        text = ""
        async for delta in engine.generate(request):
            if delta.error is not None:
                raise delta.error
            text += delta.text
        return text

    answer = await _patiently(generate, f"rules: rule {index + 1}")
    objection = await asyncio.to_thread(rule.broken_by, answer)
    if objection is not None:
        broken[index] = f"{objection}: {answer[:200]!r}"
    progress.done += 1


async def _compared(engine: EngineClient, plan: Plan, pair: Pair, where: str) -> ScoredPair:
    ids, start = await asyncio.to_thread(tokens_of, pair, engine.tokenizer)
    request = CompareRequest(plan.tenant, ids, start, plan.lanes)
    lanes = await _patiently(lambda: engine.compare(request), where)
    return ScoredPair(ids, start, tuple(lanes))


async def _patiently(call: Callable[[], Awaitable[Any]], where: str) -> Any:
    """What ``call`` gives, tried again while too much background work waits."""
    while True:
        try:
            return await call()
        except QueueFullError:
            await asyncio.sleep(_AGAIN_S)
        except RequestError as error:
            error.message = f"{where}: {error.message}"
            raise


def _values(plan: Plan, lanes: Sequence[_Lane], broken: dict[int, str]) -> dict[str, float]:
    candidate, base = lanes[0], lanes[-1]
    stable = lanes[1] if plan.stable else None
    values: dict[str, float] = {}
    if plan.own:
        values["own_perplexity_to_base"] = _ratio(candidate.own, base.own)
        values["own_exact_match_over_base"] = candidate.own.exact_match - base.own.exact_match
    if plan.own and stable:
        values["own_perplexity_to_stable"] = _ratio(candidate.own, stable.own)
        values["own_exact_match_over_stable"] = candidate.own.exact_match - stable.own.exact_match
    if stable:
        values["general_perplexity_to_stable"] = _ratio(candidate.general, stable.general)
    values["general_perplexity_to_base"] = _ratio(candidate.general, base.general)
    values["general_exact_match_over_base"] = (
        candidate.general.exact_match - base.general.exact_match
    )
    # The base is the last lane, and the divergence of a lane is that of the candidate from it.
    values["general_divergence"] = base.general.divergence
    values["calibration_error"] = candidate.calibration
    values["robustness_over_base"] = mean(candidate.robustness) - mean(base.robustness)
    if plan.rules:
        values["rules_kept"] = 1 - len(broken) / len(plan.rules)
    return values


def _ratio(one: Tally, other: Tally) -> float:
    return one.perplexity / other.perplexity if other.perplexity else math.nan


def _rules_shown(plan: Plan, broken: dict[int, str]) -> dict[str, Any]:
    first = [{"rule": index + 1, "broken": broken[index]} for index in sorted(broken)[:_SHOWN]]
    return {"items": len(plan.rules), "kept": len(plan.rules) - len(broken), "broken": first}
