"""What a caller may have meant by a name that is not known."""

from __future__ import annotations

import bisect
import difflib
import heapq
from collections.abc import Iterable
from typing import Final

_LONGEST: Final = 128
_NEIGHBOURS: Final = 24
_COMPARED: Final = 8
_SHOWN: Final = 3


class NearNames:
    """Finds near names among many without comparing with all of them. Immutable.

    Only those that begin or end like the text are looked at: its neighbours in the sorted names and
    in the sorted reversed names. The few of them that share the longest beginning and end with the
    text are compared in full. So the time follows neither the number of names nor their length.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._forward = sorted(names)
        self._backward = sorted(name[::-1] for name in self._forward)

    def near(self, text: str) -> list[str]:
        """At most three names like ``text`` (its first 128 characters), the nearest first."""
        text = text[:_LONGEST]
        found = set(_neighbours(self._forward, text))
        found.update(name[::-1] for name in _neighbours(self._backward, text[::-1]))
        likely = heapq.nlargest(_COMPARED, sorted(found), key=lambda name: _shared(name, text))
        return difflib.get_close_matches(text, likely, n=_SHOWN, cutoff=0.6)


def _neighbours(names: list[str], text: str) -> list[str]:
    at = bisect.bisect_left(names, text)
    return names[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]


def _shared(name: str, text: str) -> float:
    """How much of the longer one is a common beginning or a common end of both."""
    return (_same(name, text) + _same(name[::-1], text[::-1])) / max(len(name), len(text), 1)


def _same(a: str, b: str) -> int:
    """Characters that both begin with."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unequal, min(len(a), len(b)))
