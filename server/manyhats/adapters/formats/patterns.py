"""Regular expressions from strangers, matched as Python's ``re`` would, within a bounded time.

PEFT hands ``target_modules``, ``exclude_modules``, ``layers_pattern`` and the keys of
``rank_pattern`` and ``alpha_pattern`` to ``re``, which cannot be interrupted: one pattern could
stop the server. The ``regex`` package can. The two agree on the constructs that are let through
here, and on nothing is it guessed: a pattern with any other construct is refused.
"""

from __future__ import annotations

import re
import time
from typing import Final

import regex

from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

_MAX_CHARS: Final = 2048
_MAX_DEPTH: Final = 32
# regex unrolls counted repetitions, so characters times repetitions bound the size of what is built
_MAX_UNROLLED: Final = 100_000
_MATCH_SECONDS: Final = 5.0

_GROUPS: Final = ("?:", "?=", "?!", "?<=", "?<!", "?>")
_NAMED_GROUP: Final = re.compile(r"\?P<[A-Za-z_][A-Za-z0-9_]*>")
_ESCAPES: Final = frozenset("dDwWsSbBAZ")
_REPEAT: Final = re.compile(r"\{(\d{1,4})(?:(,)(\d{1,4})?)?\}|\{,(\d{1,4})\}")
_SET_OPERATORS: Final = ("--", "&&", "~~", "||", "[")
_IGNORE_CASE: Final = "(?i)"
_LITERAL: Final = re.compile(r"[A-Za-z0-9_.]+")


class Pattern:
    """One checked pattern; made by ``Matcher``."""

    def __init__(
        self, owner: Matcher, compiled: regex.Pattern[str], source: str, field: str
    ) -> None:
        self._owner = owner
        self._compiled = compiled
        self._source = source
        self._field = field

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of ``name`` matches. Raises AdapterRejectedError when time is up."""
        timeout = self._owner.left(self._source, self._field)
        try:
            return self._compiled.fullmatch(name, timeout=timeout, concurrent=True) is not None
        except TimeoutError:
            raise self._owner.too_slow(self._source, self._field) from None

    def group_at_start(self, name: str, group: str) -> str | None:
        """What ``group`` matched where the pattern matches from the start of ``name``.

        None where there is no match, empty where the match took a way around the group. Raises
        AdapterRejectedError when time is up.
        """
        timeout = self._owner.left(self._source, self._field)
        try:
            found = self._compiled.match(name, timeout=timeout, concurrent=True)
        except TimeoutError:
            raise self._owner.too_slow(self._source, self._field) from None
        return None if found is None else found.group(group) or ""


class Matcher:
    """Compiles the patterns of one adapter; they share a budget of time. One thread at a time."""

    def __init__(self, seconds: float = _MATCH_SECONDS) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._compiled: dict[tuple[str, str], Pattern] = {}

    def compile(self, source: str, field: str, template: str = "{}") -> Pattern:
        """Check ``source`` and compile ``template`` with ``source`` put in.

        Args:
            source: The caller's pattern.
            field: The configuration's field that it comes from.
            template: What PEFT builds around it, with ``{}`` where the source goes.

        Raises:
            AdapterRejectedError: ``bad_config`` where it is no regular expression, uses a construct
                that is not let through, is too large, or time is up.
        """
        text = template.replace("{}", source, 1)
        if known := self._compiled.get((field, text)):
            return known
        _check(source, field)
        self.left(source, field)
        try:
            re.compile(text)
            compiled = regex.compile(text, regex.V0)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise _refused(source, field, f"is no regular expression: {error}") from None
        pattern = self._compiled[field, text] = Pattern(self, compiled, source, field)
        return pattern

    def left(self, source: str, field: str) -> float:
        """Seconds left. Raises AdapterRejectedError where there are none."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise self.too_slow(source, field)
        return seconds

    def too_slow(self, source: str, field: str) -> AdapterRejectedError:
        """The refusal of the pattern at which time ran out."""
        bound = f"the bound for all patterns together is {self._seconds:g} s"
        return _refused(source, field, f"takes too long to match; {bound}")


def is_literal(pattern: str) -> bool:
    """Whether ``literal_suffix`` can match it: letters, digits, ``_`` and ``.`` only."""
    return _LITERAL.fullmatch(pattern) is not None


def literal_suffix(pattern: str, name: str) -> bool:
    r"""``re.match(rf"(.*\.)?({pattern})$", name)`` for a literal pattern, without compiling it.

    There may be hundreds of them. The dot stands for any character, as in ``re``.
    """
    start = len(name) - len(pattern)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return name.endswith(pattern) or (
        "." in pattern and all(p in (c, ".") for p, c in zip(pattern, name[start:], strict=True))
    )


def _check(source: str, field: str) -> None:
    """Let through what ``re`` and ``regex`` read alike; refuse the rest by name."""
    if len(source) > _MAX_CHARS:
        raise _refused(
            source, field, f"has {len(source)} characters, over the bound of {_MAX_CHARS}"
        )
    if not (source.isascii() and source.isprintable()):
        raise _refused(source, field, "holds characters other than printable ASCII")
    position, depth, unrolled = 0, 0, len(source)
    if source.startswith(_IGNORE_CASE):
        position = len(_IGNORE_CASE)
    while position < len(source):
        char = source[position]
        if char == "\\":
            position = _after_escape(source, position, field)
        elif char == "[":
            position = _after_set(source, position, field)
        elif char == "{":
            position, times = _after_repeat(source, position, field)
            unrolled *= times
        else:
            if char == "(":
                depth += 1
                _check_group(source, position, field)
            elif char == ")":
                depth -= 1
            position += 1
        if depth > _MAX_DEPTH or unrolled > _MAX_UNROLLED:
            raise _refused(source, field, "nests or repeats too much")


def _after_escape(source: str, position: int, field: str) -> int:
    escaped = source[position + 1 : position + 2]
    if not escaped or (escaped.isalnum() and escaped not in _ESCAPES):
        raise _refused(source, field, f"uses the escape \\{escaped}, which is not supported")
    return position + 2


def _after_set(source: str, position: int, field: str) -> int:
    """The position after the character set that begins at ``position``."""
    position += 2 if source.startswith("[^", position) else 1
    first = position
    while position < len(source) and (source[position] != "]" or position == first):
        if source.startswith(_SET_OPERATORS, position):
            raise _refused(source, field, "uses an operator or a bracket inside a character set")
        position = (
            _after_escape(source, position, field) if source[position] == "\\" else position + 1
        )
    if position >= len(source):
        raise _refused(source, field, "has a character set without an end")
    return position + 1


def _after_repeat(source: str, position: int, field: str) -> tuple[int, int]:
    found = _REPEAT.match(source, position)
    if found is None:
        raise _refused(
            source, field, "uses a brace for something else than {n}, {n,}, {,m} or {n,m}"
        )
    counts = [int(text) for text in found.groups() if text not in (None, ",")]
    return found.end(), max(1, *counts)


def _check_group(source: str, position: int, field: str) -> None:
    inside = source[position + 1 : position + 200]
    if inside.startswith(_GROUPS) or _NAMED_GROUP.match(inside):
        return
    if inside.startswith(("?", "*")):
        raise _refused(source, field, f"uses the construct ({inside[:4]}, which is not supported")


def _refused(source: str, field: str, why: str) -> AdapterRejectedError:
    return AdapterRejectedError(
        "bad_config", f"{field}: the pattern {shown(source)} {why}", param=field
    )
