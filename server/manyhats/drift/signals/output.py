"""Signals of the answer: its length and ending, repetition, refusals, the JSON it was to be."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from manyhats.drift.signals import Values
from manyhats.drift.signals.finished import Ending, Finished

NGRAM: Final = 4
"""Tokens of an n-gram for ``repetition``."""

_LOOKED_AT: Final = 4096
_OPENING: Final = 240

# How assistants decline, at the opening of an answer and in English alone. What matters is a share
# that moves, not a single answer: a matcher that is simple and the same every day does for that.
_REFUSAL: Final = re.compile(
    r"\b(?:i(?:'|\u2019)?m sorry,? (?:but )?i (?:can(?:'|\u2019|no)?t|am (?:not able|unable))"
    r"|i (?:can(?:'|\u2019)t|cannot|can not|won(?:'|\u2019)t|am (?:not able|unable) to) "
    r"(?:help|assist|provide|answer|comply|fulfil|do that|continue|create|write|generate|support)"
    r"|i (?:must|have to) (?:decline|refuse)"
    r"|as an ai(?: language)? model,? i"
    r"|(?:against|violates?) my (?:guidelines|programming|policies))",
    re.IGNORECASE,
)


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that came before in the same answer (1 - distinct / all), 0 to 1.

    Known as seq-rep-4 (Welleck et al. 2020, Neural Text Generation with Unlikelihood Training).
    """
    ids = token_ids[:_LOOKED_AT]
    count = len(ids) - NGRAM + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(ids[i : i + NGRAM]) for i in range(count)}) / count


def distinct_ratio(token_ids: Sequence[int]) -> float:
    """Distinct tokens over all, 0 to 1 (distinct-1, Li et al. 2016); 1 of no tokens."""
    ids = token_ids[:_LOOKED_AT]
    return len(set(ids)) / len(ids) if ids else 1.0


def is_refusal(text: str) -> bool:
    """Whether the answer's first 240 characters decline, in one of a few English phrases."""
    return _REFUSAL.search(text[:_OPENING]) is not None


def is_json(text: str) -> bool:
    """Whether the text is one JSON value, nothing around it but space."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def output_signals(done: Finished) -> Values:
    """The output's signals; an error has the finish reason alone."""
    if done.ending is Ending.ERROR:
        return {"finish_reason": done.ending.value}
    values: dict[str, float | str] = {
        "output_tokens": float(len(done.token_ids)),
        "repetition": repetition(done.token_ids),
        "distinct_ratio": distinct_ratio(done.token_ids),
        "empty": float(not done.text.strip()),
        "refusal": float(is_refusal(done.text)),
        "finish_reason": done.ending.value,
    }
    if done.json_asked and done.ending is Ending.STOP:  # cut off at its bound, none can be whole
        values["json_invalid"] = float(not is_json(done.text))
    return values
