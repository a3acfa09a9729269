"""The signals: what is measured of a request, on which scale, and which way is worse.

Each group is a file of pure functions from a finished request, or from a rescored one, to numbers.
``SIGNALS`` is a closed list, so that what is kept of a version and the labels of the metrics are
bounded.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from manyhats.drift.signals.script import SCRIPTS

Values = Mapping[str, float | str]
"""What one request gives: a number by a signal's name, or a category."""


class Kind(enum.Enum):
    """What a signal's values are: numbers, yes or no (1 or 0), or one of a few categories."""

    NUMBER = "number"
    FLAG = "flag"
    CATEGORY = "category"


class Worse(enum.Enum):
    """Which way is worse; a canary is compared with the stable version that way alone."""

    UP = "up"
    DOWN = "down"
    EITHER = "either"


class Group(enum.StrEnum):
    """Where a signal comes from. BASE ones come of rescoring, so of sampled requests alone."""

    OUTPUT = "output"
    INPUT = "input"
    SERVICE = "service"
    PEOPLE = "people"
    BASE = "base"


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal. ``low`` and ``high`` bound its values: what lies beyond counts as the bound.

    ``log``: the scale is logarithmic. ``sampled``: it comes only of sampled requests.
    ``categories``: of a CATEGORY, all that there are.
    """

    name: str
    group: Group
    kind: Kind
    worse: Worse
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    sampled: bool = False
    categories: tuple[str, ...] = ()

    def unit(self, value: float) -> float:
        """``value`` on the signal's scale in [0, 1]. NaN counts as the worse end."""
        if math.isnan(value):
            return 0.0 if self.worse is Worse.DOWN else 1.0
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, unit: float) -> float:
        """The inverse of ``unit``."""
        if self.log:
            return float(self.low * (self.high / self.low) ** unit)
        return self.low + unit * (self.high - self.low)


def _number(
    name: str,
    group: Group,
    worse: Worse,
    low: float,
    high: float,
    *,
    log: bool = False,
    sampled: bool = False,
) -> Signal:
    return Signal(name, group, Kind.NUMBER, worse, low, high, log, sampled)


def _flag(name: str, group: Group) -> Signal:
    return Signal(name, group, Kind.FLAG, Worse.UP)


_SIGNALS: Final = (
    _number("output_tokens", Group.OUTPUT, Worse.EITHER, 1, 65536, log=True),
    _number("repetition", Group.OUTPUT, Worse.UP, 0, 1),
    _number("distinct_ratio", Group.OUTPUT, Worse.DOWN, 0, 1),
    _flag("empty", Group.OUTPUT),
    _flag("refusal", Group.OUTPUT),
    _flag("json_invalid", Group.OUTPUT),
    Signal(
        "finish_reason",
        Group.OUTPUT,
        Kind.CATEGORY,
        Worse.EITHER,
        categories=("stop", "length", "error"),
    ),
    _number("mean_logprob", Group.OUTPUT, Worse.DOWN, -12, 0, sampled=True),
    _number("mean_entropy", Group.OUTPUT, Worse.EITHER, 0, 12, sampled=True),
    _number("prompt_tokens", Group.INPUT, Worse.EITHER, 1, 1 << 20, log=True),
    Signal("script", Group.INPUT, Kind.CATEGORY, Worse.EITHER, categories=SCRIPTS),
    _number("prompt_nll", Group.INPUT, Worse.EITHER, 0, 15, sampled=True),
    _number("hidden_distance", Group.INPUT, Worse.UP, 0.1, 1000, log=True, sampled=True),
    _flag("error", Group.SERVICE),
    _flag("load_failure", Group.SERVICE),
    _number("ttft_seconds", Group.SERVICE, Worse.UP, 1e-3, 600, log=True),
    _number("inter_token_seconds", Group.SERVICE, Worse.UP, 1e-4, 10, log=True),
    _number("feedback_score", Group.PEOPLE, Worse.DOWN, -1, 1),
    _number("kl", Group.BASE, Worse.UP, 0, 10, sampled=True),
    _number("agreement", Group.BASE, Worse.DOWN, 0, 1, sampled=True),
    _number("logprob_gap", Group.BASE, Worse.EITHER, -10, 10, sampled=True),
    _number("answer_nll", Group.BASE, Worse.UP, 0, 15, sampled=True),
)

SIGNALS: Final[Mapping[str, Signal]] = MappingProxyType({s.name: s for s in _SIGNALS})
"""Every signal by its name."""
