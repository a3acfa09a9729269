"""How far a prompt lies from the usual ones: Mahalanobis distance of its mean hidden state.

A hidden state has hundreds of dimensions and the reference few prompts, so it is projected first,
by a fixed random matrix (Johnson and Lindenstrauss), to DIMENSIONS; the covariance there is shrunk
towards a multiple of the identity. That bounds what a version keeps to a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

DIMENSIONS: Final = 12
"""Dimensions of the projection."""
FITTED: Final = 48
"""Prompts from which mean and covariance come; distances are measured after them."""

Vector = npt.NDArray[np.float64]


class HiddenReference:
    """Mean and covariance of the first FITTED hidden states, then the distance of each further one.

    ``merge`` adds another replica's, as long as neither is full.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Vector = np.zeros(DIMENSIONS)
        self._outer: Vector = np.zeros((DIMENSIONS, DIMENSIONS))
        self._inverse: Vector | None = None

    def add(self, hidden: Sequence[float]) -> float | None:
        """The distance of ``hidden``; None while it goes into the reference itself."""
        return self.add_projected(projected(hidden)) if len(hidden) else None

    def add_projected(self, point: Vector) -> float | None:
        """The same of what ``projected`` gave."""
        if self.count < FITTED:
            self.count += 1
            self._sum += point
            self._outer += np.outer(point, point)
            return None
        if self._inverse is None:
            self._inverse = np.asarray(np.linalg.inv(self._covariance()), dtype=np.float64)
        away = point - self._sum / self.count
        return math.sqrt(max(0.0, float(away @ self._inverse @ away)))

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {"n": self.count, "sum": self._sum.tolist(), "outer": self._outer.tolist()}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> HiddenReference:
        """What ``dump`` gave."""
        made = cls()
        made.count = int(value["n"])
        made._sum = np.asarray(value["sum"], dtype=np.float64)
        made._outer = np.asarray(value["outer"], dtype=np.float64)
        return made

    def _covariance(self) -> Vector:
        """The sample covariance S, shrunk: (1 - w) S + w (tr S / p) I, w = p / (p + n)."""
        mean = self._sum / self.count
        sample = self._outer / self.count - np.outer(mean, mean)
        weight = DIMENSIONS / (DIMENSIONS + self.count)
        level = max(float(np.trace(sample)) / DIMENSIONS, 1e-12)
        shrunk: Vector = (1 - weight) * sample + weight * level * np.eye(DIMENSIONS)
        return shrunk


def projected(hidden: Sequence[float]) -> Vector:
    """A hidden state, [width], on DIMENSIONS."""
    found: Vector = np.asarray(hidden, dtype=np.float64) @ _projection(len(hidden))
    return found


@lru_cache(maxsize=4)
def _projection(width: int) -> Vector:
    """The same matrix on every replica and after every start."""
    generator = np.random.default_rng(20_240_229)
    made: Vector = generator.standard_normal((width, DIMENSIONS)) / np.sqrt(width)
    return made
