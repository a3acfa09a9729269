"""Ranks inside a family's own form, which are not the ranks that are served."""

from __future__ import annotations

from typing import Final

from manyhats.adapters.formats.fields import positive
from manyhats.adapters.formats.job import Job
from manyhats.adapters.formats.patterns import is_literal
from manyhats.adapters.formats.targets import PatternTable
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

MAX_INNER: Final = 4096
"""Bound of a rank inside a family's own form: what is built from it must fit the memory."""


def inner_rank(job: Job, field: str, value: object) -> int:
    """A positive integer up to MAX_INNER; also ``rank_too_large``."""
    found = positive(field, value)
    if found > MAX_INNER:
        raise AdapterRejectedError(
            "rank_too_large",
            f"{field} is {shown(found)}, over the bound of {MAX_INNER}",
            param=field,
        )
    return found


def literal_table(job: Job, values: dict[str, int], field: str) -> PatternTable[int]:
    """A pattern table of module names alone, where PEFT's patterns bind otherwise than LoRA's."""
    for key in values:
        if not is_literal(key):
            raise AdapterRejectedError(
                "bad_config", f"{field}: {shown(key)} is no plain module name", param=field
            )
    return PatternTable(values, field, job.matcher)
