"""Random numbers that depend on nothing but a seed and a position.

A sequence's draw at output index ``i`` uses one uniform that is a pure function of ``(seed, i)``,
so a request's tokens do not depend on who shares its batch, on preemption, or on how often it was
rescheduled.

The function is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
OOPSLA 2014; the constants are those of Vigna's public-domain ``splitmix64.c``): the (i + 1)-th
output of the generator whose state starts at ``mix(seed)``. Mixing the seed first sends seeds that
lie near each other (0, 1, 2, ... as callers choose them) to unrelated places of the generator's one
cycle of 2**64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MASK64: Final = (1 << 64) - 1


def mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function: a bijection of 64-bit words, of any shape."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream_starts(seeds: Sequence[int]) -> NDArray[np.uint64]:
    """The generator's starting state for each seed, [N] uint64. A seed counts modulo 2**64."""
    return mix64(np.array([seed & _MASK64 for seed in seeds], dtype=np.uint64))


def uniforms(starts: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One uniform in [0, 1) a row: the top 53 bits of its stream's output number ``position + 1``.

    ``starts`` comes from ``stream_starts``; it and ``positions`` are [N] uint64; the result is [N]
    float64.
    """
    words = mix64(starts + (positions + np.uint64(1)) * _GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
