"""W3C Trace Context (www.w3.org/TR/trace-context): the ``traceparent`` header."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEADER = "traceparent"
STATE_HEADER = "tracestate"
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class TraceParent:
    """Which trace a request belongs to, and the span that sent it; both in lower-case hex."""

    trace_id: str
    span_id: str
    flags: str

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    @classmethod
    def parse(cls, text: str) -> TraceParent | None:
        """The header's meaning; None for one that the standard says to ignore: malformed, zero
        ids, version ff, or version 00 with something behind it.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            return None
        version, trace_id, span_id, flags, rest = match.groups()
        if version == "ff" or (version == "00" and rest) or not int(trace_id, 16):
            return None
        return cls(trace_id, span_id, flags) if int(span_id, 16) else None
