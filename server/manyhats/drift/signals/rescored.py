"""Signals of a sampled request that the bare base has scored again, teacher-forced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manyhats.drift.signals import Values


@dataclass(frozen=True, slots=True)
class Rescored:
    """One request under its adapter (``own``) and under another (``other``: the base, or stable).

    Each sequence has one entry a token of the answer, in order; natural logarithms. ``prompt_nll``:
    the other's mean -log p of the prompt's tokens after the first, None of a prompt of one.
    ``hidden``: the prompt's mean last hidden state under the other; may be empty.
    """

    own_logprobs: Sequence[float]
    other_logprobs: Sequence[float]
    kl: Sequence[float]
    agrees: Sequence[bool]
    entropy: Sequence[float]
    prompt_nll: float | None
    hidden: Sequence[float] = ()


def rescored_signals(found: Rescored) -> Values:
    """Means over the answer's tokens: KL(own || other), top-1 agreement, log-probabilities."""
    values: dict[str, float | str] = {}
    if found.prompt_nll is not None:
        values["prompt_nll"] = found.prompt_nll
    if len(found.kl) == 0:
        return values
    own, other = _mean(found.own_logprobs), _mean(found.other_logprobs)
    values |= {
        "kl": _mean(found.kl),
        "agreement": _mean([float(same) for same in found.agrees]),
        "logprob_gap": own - other,
        "answer_nll": -other,
        "mean_logprob": own,
        "mean_entropy": _mean(found.entropy),
    }
    return values


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
