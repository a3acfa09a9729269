"""Reads a trace of requests from CSV, to be played as it happened or faster.

The first line names the columns, in any order; others are ignored. Two names are known for each:

| column | in Azure's LLM inference traces | what it is |
|---|---|---|
| ``at_s`` | ``TIMESTAMP`` | seconds, or an ISO 8601 date and time; the first row is the start |
| ``input_tokens`` | ``ContextTokens`` | tokens of the prompt, at least 1 |
| ``output_tokens`` | ``GeneratedTokens`` | tokens of the answer, at least 1 |
| ``adapter`` (may be missing) | | any label; an empty one is the base model |

Azure's traces (github.com/Azure/AzurePublicDataset) name no adapter; ``spread`` gives them some.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from workload import AdapterChoice, TimedRequest

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "at_s": ("at_s", "TIMESTAMP"),
    "input_tokens": ("input_tokens", "ContextTokens"),
    "output_tokens": ("output_tokens", "GeneratedTokens"),
}
"""What is needed, and under which names it may come."""
ADAPTER_COLUMN = "adapter"


class TraceError(ValueError):
    """A trace that cannot be read; the message names the row (the header is row 1) and column."""


def read_trace(path: Path) -> list[TimedRequest]:
    """The file's requests. Adapters are numbered in the order in which their labels appear.

    Raises TraceError for a missing column, a bad value, or a row that is earlier than the one
    before; OSError.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        return parse_trace(csv.DictReader(file))


def parse_trace(rows: csv.DictReader[str]) -> list[TimedRequest]:
    """As ``read_trace``, of rows that are read already."""
    names = _names(rows.fieldnames or ())
    adapters: dict[str, int] = {}
    made: list[TimedRequest] = []
    origin = before = None
    for row in rows:
        # Not the count of rows: a quoted field may run over several lines.
        line = rows.line_num
        at = _time(row, line, names["at_s"])
        origin = at if origin is None else origin
        if before is not None and at < before:
            raise _bad(line, names["at_s"], f"{row[names['at_s']]!r} is before the row above")
        before = at
        label = (row.get(ADAPTER_COLUMN) or "").strip()
        made.append(
            TimedRequest(
                at - origin,
                adapters.setdefault(label, len(adapters)) if label else None,
                _count(row, line, names["input_tokens"]),
                _count(row, line, names["output_tokens"]),
            )
        )
    if not made:
        raise TraceError("the trace has no rows")
    return made


def spread(
    requests: Iterable[TimedRequest], adapters: int, alpha: float, seed: int
) -> list[TimedRequest]:
    """The requests with adapters drawn by a power law, as in a generated workload."""
    choice, rng = AdapterChoice(adapters, alpha), random.Random(seed)
    return [replace(request, adapter=choice.draw(rng)) for request in requests]


def adapted(
    requests: Sequence[TimedRequest],
    *,
    speed: float = 1.0,
    first_s: float = math.inf,
    max_input: int | None = None,
    max_output: int | None = None,
) -> list[TimedRequest]:
    """The trace's first ``first_s`` seconds, ``speed`` times as fast, lengths cut to the bounds.

    Raises ValueError unless ``speed`` is positive.
    """
    if not speed > 0:
        raise ValueError(f"speed must be positive, got {speed}")
    return [
        replace(
            r,
            at_s=r.at_s / speed,
            input_tokens=min(r.input_tokens, max_input or r.input_tokens),
            output_tokens=min(r.output_tokens, max_output or r.output_tokens),
        )
        for r in requests
        if r.at_s <= first_s
    ]


def _names(header: Sequence[str]) -> dict[str, str]:
    found = {}
    for column, known in COLUMNS.items():
        present = [name for name in known if name in header]
        if len(present) != 1:
            problem = "is missing" if not present else "is there twice"
            raise TraceError(f"row 1: column {' or '.join(known)} {problem}")
        found[column] = present[0]
    return found


def _time(row: Mapping[str, str | None], line: int, column: str) -> float:
    """Seconds; a date and time without a zone is taken for UTC."""
    text = (row[column] or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            raise _bad(line, column, f"must be seconds or a date and time, got {text!r}") from None
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise _bad(line, column, f"must be finite, got {text!r}")
    return seconds


def _count(row: Mapping[str, str | None], line: int, column: str) -> int:
    text = (row[column] or "").strip()
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise _bad(line, column, f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _bad(line: int, column: str, problem: str) -> TraceError:
    return TraceError(f"row {line}, column {column}: {problem}")
