"""JSON as taken from strangers: bounded, UTF-8, no duplicate keys, no NaN, no lone surrogates."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Final, NoReturn

from manyhats.errors import AdapterRejectedError

_SHOWN_CHARS = 120
_SHOWN_NAMES = 6
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
"""What a string must have in its text to hold half a character: UTF-8 has none itself."""


def shown(value: object) -> str:
    """``value`` as an error message may carry it: its repr, cut to a bounded length."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def listed(names: Iterable[str]) -> str:
    """The first few of ``names`` and how many more there are, for an error message."""
    every = list(names)
    head = ", ".join(
        name if name.isprintable() and len(name) <= _SHOWN_CHARS else shown(name)
        for name in every[:_SHOWN_NAMES]
    )
    more = len(every) - _SHOWN_NAMES
    return f"{head} and {more} more" if more > 0 else head


def parse_object(
    data: bytes | bytearray, *, reason: str, what: str, max_depth: int
) -> dict[str, object]:
    """Parse ``data`` as one JSON object.

    Args:
        data: The text; its length is bounded by the caller.
        reason: Reason code of a refusal.
        what: What is parsed, as messages name it.
        max_depth: Objects and arrays inside one another, the outermost counted.

    Raises:
        AdapterRejectedError: Not UTF-8, not JSON, not an object, a duplicate key, a number that is
            not finite, an escape that is no character, or nesting over the bound.
    """
    try:
        text = data.decode("utf-8")
        parsed = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_not_finite,
            parse_float=_finite,
        )
        if not isinstance(parsed, dict):
            raise ValueError(f"a {type(parsed).__name__} where an object must be")
        _check_depth(parsed, max_depth)
        if _SURROGATE.search(text):
            _check_characters(parsed)
    except RecursionError:
        raise AdapterRejectedError(reason, f"{what} is nested deeper than {max_depth}") from None
    except ValueError as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise AdapterRejectedError(reason, f"{what} is not usable JSON: {_brief(error)}") from None
    return parsed


def _brief(error: ValueError) -> str:
    # UnicodeDecodeError's own text holds the bytes only by position, so both are bounded after a
    # cut
    return str(error).encode("utf-8", "backslashreplace").decode()[: 2 * _SHOWN_CHARS]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} comes twice")
            seen.add(key)
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"the number {text} is not finite")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:_SHOWN_CHARS]} is not finite")
    return number


def _check_depth(root: dict[str, object], max_depth: int) -> None:
    """Without recursion, so that no input can exhaust the stack."""
    level: list[object] = [root]
    for _ in range(max_depth):
        level = [
            inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {max_depth}")


def _check_characters(root: dict[str, object]) -> None:
    """No key and no string holds half a character. The depth is bounded."""
    level: list[object] = [root]
    while level:
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    key.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError
            elif isinstance(value, str):
                value.encode("utf-8")
        level = [inner for outer in level for inner in _inside(outer)]


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
