"""The figures of an evaluation, out of what the engine says of each token. Pure arithmetic.

Perplexity is exp(-mean log p) over all tokens of all completions. A completion is matched exactly
where every one of its tokens is the likeliest one: greedy decoding would give it (as
lm-evaluation-harness's ``is_greedy``). Calibration is the expected calibration error of the token
confidences (Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML
2017, equation 3): sum over M equal bins of |B| / n * |accuracy(B) - confidence(B)|, where a token
is right if it is the completion's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from manyhats.engine.interface import LaneScores

BINS: Final = 15
"""Bins of the calibration error, as in the paper."""


@dataclass(slots=True)
class Tally:
    """What one version of the model made of a set of completions."""

    items: int = 0
    exact: int = 0
    logprobs: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def add(self, scores: LaneScores, targets: Sequence[int]) -> None:
        """One completion more."""
        right = [top == target for top, target in zip(scores.top_ids, targets, strict=True)]
        self.items += 1
        self.exact += all(right)
        self.logprobs += scores.logprobs
        self.confidences += scores.confidences
        self.correct += right
        self.divergences += scores.divergences

    @property
    def perplexity(self) -> float:
        """See the module. NaN where there is no token."""
        if not self.logprobs:
            return math.nan
        return math.exp(min(700.0, -math.fsum(self.logprobs) / len(self.logprobs)))

    @property
    def exact_match(self) -> float:
        """Share of the completions, NaN where there is none."""
        return self.exact / self.items if self.items else math.nan

    @property
    def divergence(self) -> float:
        """Mean over the tokens, nats; NaN where there is none."""
        return mean(self.divergences)

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "items": self.items,
            "tokens": len(self.logprobs),
            "perplexity": finite(self.perplexity),
            "exact_match": finite(self.exact_match),
        }


def calibration_error(
    confidences: Sequence[float], correct: Sequence[bool], bins: int = BINS
) -> float:
    """ECE over ``bins`` equal bins of (0, 1]; NaN where there is no token."""
    total = len(confidences)
    if not total:
        return math.nan
    counts, conf, right = [0] * bins, [0.0] * bins, [0] * bins
    for confidence, is_right in zip(confidences, correct, strict=True):
        place = min(bins - 1, max(0, math.ceil(confidence * bins) - 1))
        counts[place] += 1
        conf[place] += confidence
        right[place] += is_right
    return sum(abs(right[i] - conf[i]) for i in range(bins)) / total


def stability(tops: Sequence[int], perturbed: Sequence[int]) -> float:
    """Share of positions of one completion whose likeliest token is the same for both prompts."""
    return mean([a == b for a, b in zip(tops, perturbed, strict=True)])


def mean(values: Iterable[float]) -> float:
    """The mean, NaN of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else math.nan


def finite(value: float) -> float | None:
    """The value for JSON: None for NaN and infinity."""
    return value if math.isfinite(value) else None
