"""In which script a text is mostly written, by the names of its letters in the Unicode database."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Final

SCRIPTS: Final = (
    "latin",
    "cyrillic",
    "greek",
    "arabic",
    "hebrew",
    "devanagari",
    "cjk",
    "hiragana",
    "katakana",
    "hangul",
    "thai",
    "other",
    "none",
)
"""The scripts told apart; ``other`` is any further one, ``none`` a text without letters."""

_NAMED: Final = frozenset(SCRIPTS) - {"other", "none"}
_LOOKED_AT: Final = 2048


def main_script(text: str) -> str:
    """The script of most letters among the first 2,048 characters; one out of SCRIPTS.

    The first word of a letter's name in the Unicode Character Database names its script (CYRILLIC
    SMALL LETTER A), which the standard library keeps; of a tie the earlier in SCRIPTS wins.
    """
    counts = Counter(_script(c) for c in text[:_LOOKED_AT] if c.isalpha())
    if not counts:
        return "none"
    return max(SCRIPTS, key=lambda script: counts[script])


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    word = unicodedata.name(letter, "").split(" ", 1)[0].lower()
    return word if word in _NAMED else "other"
