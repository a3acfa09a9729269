"""The texts that are kept with a name, beside its document: what its versions are evaluated on, and
the last report of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from manyhats.lifecycle.records import AdapterRecord
from manyhats.lifecycle.store import Texts

DATA: Final = "data"
"""Pairs of prompt and completion, JSONL as it was given."""

RULES: Final = "rules"
"""Rules for what is generated, JSONL as it was given."""


def text_key(name: str, what: str | int) -> str:
    """The key of a name's DATA or RULES, or of the report of one of its versions."""
    return f"{name}/{what}"


def texts_of(name: str, gone: Iterable[AdapterRecord], *, whole: bool) -> list[str]:
    """The keys of all that goes with these versions, or with the ``whole`` name."""
    reports = [text_key(name, record.ref.version) for record in gone]
    return [*reports, *(text_key(name, what) for what in (DATA, RULES) if whole)]


def digests(texts: Texts) -> dict[str, str | None]:
    """What the audit log keeps of texts: their SHA-256 by what they are, None for one removed."""
    return {
        key.rpartition("/")[2]: None if text is None else hashlib.sha256(text.encode()).hexdigest()
        for key, text in texts.items()
    }
