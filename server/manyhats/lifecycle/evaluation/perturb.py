"""Prompts as people mistype them: the same each time for one text and seed."""

from __future__ import annotations

import random
import re
from typing import Final

_WORD = re.compile(r"[^\W\d_]{4,}")

TYPO_SHARE: Final = 0.2
"""Share of the words of four letters or more that get a typo; at least one does."""


def with_typos(text: str, seed: int = 0) -> str:
    """``text`` with two neighbouring letters swapped within a share of its words.

    Never the first letter, and never two equal ones. A text without such a word stays as it is.
    """
    draw = random.Random(f"typos {seed} {text}")  # noqa: S311 - reproducible, not secret
    words = [m for m in _WORD.finditer(text) if len(set(m[0][1:])) > 1]
    chosen = draw.sample(words, min(len(words), max(1, round(TYPO_SHARE * len(words)))))
    letters = list(text)
    for word in chosen:
        places = [i for i in range(word.start() + 1, word.end() - 1) if text[i] != text[i + 1]]
        i = draw.choice(places)
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def with_case(text: str, seed: int = 0) -> str:
    """``text`` in small letters or in capitals throughout, whichever differs from it."""
    draw = random.Random(f"case {seed} {text}")  # noqa: S311 - reproducible, not secret
    small, capital = text.lower(), text.upper()
    return capital if small == text or (capital != text and draw.random() < 0.5) else small
