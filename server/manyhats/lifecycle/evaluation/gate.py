"""What an adapter is judged by: its thresholds, and the rows that a measurement becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

_Bound = Annotated[float | None, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Thresholds(BaseModel):
    """Bounds of the measures; None measures and does not judge. docs/evaluation.md says why these.

    Ratios of perplexities and divergence are at most, differences and shares at least the bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    own_perplexity_to_stable: _Bound = 1.1
    own_perplexity_to_base: _Bound = 1.05
    own_exact_match_over_stable: _Bound = -0.05
    own_exact_match_over_base: _Bound = -0.05
    general_perplexity_to_stable: _Bound = 1.25
    general_perplexity_to_base: _Bound = 2.0
    general_exact_match_over_base: _Bound = -0.15
    general_divergence: _Bound = 1.5
    calibration_error: _Bound = 0.2
    robustness_over_base: _Bound = -0.15
    rules_kept: _Bound = 1.0


AT_LEAST: Final = frozenset(
    {
        "own_exact_match_over_stable",
        "own_exact_match_over_base",
        "general_exact_match_over_base",
        "robustness_over_base",
        "rules_kept",
    }
)
"""The measures whose bound is a lower one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measure. ``value`` None: infinite or undefined, which passes no bound."""

    measure: str
    value: float | None
    bound: float | None
    passed: bool

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "measure": self.measure,
            "value": self.value,
            "bound": self.bound,
            "at": "least" if self.measure in AT_LEAST else "most",
            "passed": self.passed,
        }

    def described(self) -> str:
        """``general_divergence 8.1 (at most 2)``."""
        value = "undefined" if self.value is None else f"{self.value:.4g}"
        side = "least" if self.measure in AT_LEAST else "most"
        return f"{self.measure} {value} (at {side} {self.bound:g})"


def judge(measured: Mapping[str, float], thresholds: Thresholds) -> tuple[Row, ...]:
    """A row a measure, in the order of ``Thresholds``; what was not measured has none."""
    rows = []
    for name, bound in thresholds.model_dump().items():
        if name not in measured:
            continue
        value = measured[name] if math.isfinite(measured[name]) else None
        passed = bound is None or (
            value is not None and (value >= bound if name in AT_LEAST else value <= bound)
        )
        rows.append(Row(name, value, bound, passed))
    return tuple(rows)
